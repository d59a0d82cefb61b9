#!/usr/bin/env bash
# Sets up .venv if need be, then runs the main job: KOALA against SGD and Adam on embedded data (no download, under 2 minutes).
# Arguments go to scripts/reproduce.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python scripts/reproduce.py quickstart --seeds 1,2,3 "$@"
