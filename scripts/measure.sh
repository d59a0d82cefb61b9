#!/usr/bin/env bash
# Measures one part of what is committed in results/ again, from this clean commit, on a CPU of two cores.
#   bash scripts/measure.sh FOLDER_OF_DATA PART
# FOLDER_OF_DATA has ptb, cifar10 and cifar100; give it relative to the repository: records carry what was typed.
# A part ends with its rows in results/measured, everything rendered, and the command that commits them. Started again it goes on
# where it was stopped. What the present code has measured already, here or elsewhere, is not measured again, but for times: those
# of `first` compare within one command only, which therefore has all of its runs. Parts, in a good order, with
# core-minutes on an AMD EPYC and runs:
#   first      40   quickstart 40, sofim/time-to-target 100 to 200, the board's times 475: one at a time, on an idle machine
#   tuning     15   150 to 260
#   rates      20   language-rates 25 to 40
#   ptb      1100   Penn Treebank's tiny LSTM at 40 epochs, and in two precisions; 22
#   cifar10    65   12
#   cifar100   50   9
#   search    200   rates on Penn Treebank, 33 to 45
#   board     620   1740; minutes by its runs, of which 1200 took 430
#   koala++    15   its sensitivity 150
#   metric    960   the filter in a metric, 2000 (docs/metric.md)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage="usage: bash scripts/measure.sh FOLDER_OF_DATA first|tuning|rates|ptb|cifar10|cifar100|search|board|koala++|metric"
[ $# -eq 2 ] && [ -d "$1" ] || { echo "$usage" >&2; exit 2; }
[ -z "$(git status --porcelain -uno)" ] || { echo "uncommitted changes: numbers are measured from a commit" >&2; exit 2; }
export OMP_NUM_THREADS=1  # one thread a run, as in the canary of the tests
python="${PYTHON:-.venv/bin/python}" data="$1" part="$2"

run() {
    "$python" scripts/reproduce.py "$@" num_gpus=0 logger=none --again $collect \
        --data-path "ptb=$data/ptb" --data-path "cifar10=$data/cifar10" --data-path "cifar100=$data/cifar100"
}
# Rows are collected after all runs: what is collected changes the tree, and runs are to be from a clean one.
for collect in "" --collect; do
    case "$part" in
        first)
            run quickstart
            run sofim/time-to-target --profile digits
            run board --profile cpu-times
            ;;
        tuning) run tuning --measured ;;
        rates) run language-rates --measured ;;
        ptb)
            run koala/supplement_table1 --only data=ptb --only model=tiny-lstm --measured
            run penn-treebank-precision --measured
            run penn-treebank-40 --measured
            ;;
        cifar10) run cifar10-cpu --measured ;;
        cifar100) run cifar100-cpu --measured ;;
        search) run penn-treebank --measured ;;
        board) run board --profile cpu --measured ;;
        koala++) run koala++/sensitivity-{q,sigma,alpha_r} --profile digits --measured ;;
        metric)
            run metric --profile cpu --measured
            run metric --profile cpu-constant --measured
            run metric --profile cpu-clipping --measured
            run metric --profile cpu-one-rate --measured
            ;;
        *) echo "$usage" >&2; exit 2 ;;
    esac
done
"$python" scripts/tables.py
echo "measured; now: git add results README.md && git commit -m 'Measured again: $part'"
