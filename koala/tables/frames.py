"""Runs as tidy pandas frames, for plots and questions of your own."""

import math
from pathlib import Path

import pandas as pd

from koala.records import RECORD
from koala.tables.measured import read_file, read_runs

COLUMNS = ["data", "model", "optimizer", "config_hash", "seed", "status"]  # of a run, in the frames below


def frame(source: str | Path) -> pd.DataFrame:
    """All ended runs below a folder, such as "outputs" or "results/measured/board": a row a run and metric.

    Columns: data, model, optimizer, config_hash, seed, status, metric and value, the run's last of that metric
    (infinite in a run that diverged, NaN where there is none), and every key of the configuration that differs among
    the runs of one data set, model and optimizer (such as `optim.lr`).

    Raises:
        ConfigError: no folder, no run below it, or a file that is not a record (names it).
    """
    rows = _rows(source)
    configs = pd.json_normalize([row["config"] for row in rows]).drop(columns="seed", errors="ignore")
    values = configs.astype(str).groupby([row["name"] for row in rows]).nunique().max()
    runs = _runs(rows).join(configs[values.index[values > 1]])
    final = pd.DataFrame([row["metrics"]["final"] for row in rows], dtype=float)
    final[runs["status"] == "diverged"] = math.inf
    return runs.join(final).melt(id_vars=list(runs), var_name="metric", value_name="value")


def history(source: str | Path) -> pd.DataFrame:
    """The learning curves of all ended runs below a folder: a row an evaluation.

    Columns: data, model, optimizer, config_hash, seed and status as in `frame`; epoch, step, seconds (of training until
    then), and every metric of the history, such as train_loss.

    Raises:
        ConfigError: as `frame`.
    """
    rows = _rows(source)
    points = pd.DataFrame([{"run": run} | point for run, row in enumerate(rows) for point in row["history"]])
    return _runs(rows).merge(points, left_index=True, right_on="run").drop(columns="run").reset_index(drop=True)


def _rows(source: str | Path) -> list[dict]:
    source = Path(source)
    files = [] if next(source.rglob(RECORD), None) else sorted(source.rglob("*.jsonl"))
    return [row for path in files for row in read_file(path)] or read_runs([source])


def _runs(rows: list[dict]) -> pd.DataFrame:
    names = [dict(zip(COLUMNS, row["name"].split("/"), strict=False)) for row in rows]
    return pd.DataFrame([name | {key: row[key] for key in COLUMNS[3:]} for name, row in zip(names, rows, strict=True)])
