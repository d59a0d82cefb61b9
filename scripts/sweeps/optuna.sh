#!/usr/bin/env bash
# Tunes an optimizer's rate with Optuna: 20 trials of its tree-structured Parzen estimator, log-uniform between 1e-4 and 10.
#   bash scripts/setup.sh sweeps
#   bash scripts/sweeps/optuna.sh optim=koala-m data=digits epochs=6       any override of train.py, and of hydra.sweeper
# What is minimised is the final row's `objective` (val_loss unless given; a run that diverged counts as infinity). The best
# trial is kept in outputs/sweeps/optimization_results.yaml, and each run as any other: asked for again, it is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-.venv/bin/python}" train.py --multirun hydra/sweeper=optuna hydra.sweeper.n_trials=20 \
    hydra.sweeper.direction=minimize hydra.sweeper.sampler.seed=1 'optim.lr=tag(log, interval(0.0001, 10))' "$@"
