#!/usr/bin/env bash
# Builds the site into build/site; a broken link, reference or docstring is an error. Arguments go to sphinx-build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh docs
.venv/bin/python -m sphinx -W --keep-going --nitpicky -q -d build/doctrees docs build/site "$@"
echo "build/site/index.html"
