#!/usr/bin/env bash
# Sets up .venv with the test extras if need be, then runs the tests. Arguments go to pytest:
#   bash scripts/test.sh                         what the README promises, once: minutes
#   bash scripts/test.sh --all                   all but the slow ones: ten minutes to half an hour
#   bash scripts/test.sh tests/optim -k golden   some of them
#   bash scripts/test.sh -m slow                 the long campaigns
# Always ends: a test that hangs fails after its `timeout`, one that hangs inside C code takes its worker with it
# (faulthandler_timeout), a dead worker ends the run with the name of its test, and both tiers have a limit in total.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev docs sweeps ecosystem
# Two workers of one thread each: several torch thread pools on the same cores are slower than one thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
stuck=(-o faulthandler_exit_on_timeout=true -o faulthandler_timeout=660)
case "${1:-}" in
    "")    set -- "${stuck[@]}" --session-timeout=900 -m "not slow and not extended" ;;
    --all) shift; set -- "${stuck[@]}" --session-timeout=2700 "$@" ;;
esac
exec .venv/bin/python -m pytest -n 2 -ra --durations=10 "$@"
