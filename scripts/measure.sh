#!/usr/bin/env bash
# Measures everything that is committed in results/ again, from this clean commit, on a CPU: about 10 hours on two cores.
#   bash scripts/measure.sh FOLDER_OF_PTB FOLDER_OF_CIFAR100 [first | tables | long]
# `first` is the timed tables and needs the machine for itself (40 min), `tables` others (2 h), `long` Penn Treebank (7 h).
# Started again it goes on where it was stopped. It ends with rows and renderings to commit, before the next part is started.
# Folders relative to the repository: records carry what was typed. One thread a run, as in the canary of the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage="usage: bash scripts/measure.sh FOLDER_OF_PTB FOLDER_OF_CIFAR100 [first | tables | long]"
[ $# -ge 2 ] || { echo "$usage" >&2; exit 2; }
[ -z "$(git status --porcelain -uno)" ] || { echo "uncommitted changes: numbers are measured from a commit" >&2; exit 2; }
export OMP_NUM_THREADS=1
ptb="$1" cifar100="$2"

here() { .venv/bin/python scripts/reproduce.py "$@" num_gpus=0 logger=none --again $collect; }

# Estimates are of an AMD EPYC: runs, minutes of one core each.
first() {
    here quickstart                                                         # 40 of 0.1, one at a time
    here sofim/time-to-target --profile digits                              # 150 of 0.2, one at a time
}
tables() {
    here tuning                                                             # 190 of 0.1
    here cifar100-cpu --data-path "cifar100=$cifar100"                      # 9 of 20
}
long() {
    here koala/supplement_table1 --profile short --data-path "ptb=$ptb"     # 3 of 60
    here language-rates --data-path "ptb=$ptb"                              # 4 of 30, 13 of 3
    here penn-treebank --data-path "ptb=$ptb"                               # 18 of 12 to 20
}

# Rows are collected after all runs: what is collected changes the tree, and runs are to be from a clean one.
for collect in "" --collect; do
    for part in ${3:-first tables long}; do "$part"; done
done
.venv/bin/python scripts/tables.py
.venv/bin/python scripts/tables.py --check
