#!/usr/bin/env bash
# Sets up .venv with the test extras if need be, then runs the tests. Arguments go to pytest:
#   bash scripts/test.sh                         all but the slow ones
#   bash scripts/test.sh tests/optim -k golden   some of them
#   bash scripts/test.sh -m slow                 the long campaigns
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev docs sweeps ecosystem
# Two workers of one thread each: several torch thread pools on the same cores are slower than one thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n 2 -ra --durations=10 "$@"
