"""Experiment files and rows made by hand, with numbers that a reader can average in the head."""

import re
from pathlib import Path

from koala.tables.experiment import Experiment, load_experiment
from koala.tables.measured import row_of
from koala.tables.published import load_published
from koala.tables.table import Table, build

SPEC = """
title: A small table
caption: Made for a test.
published: [paper, table1]
base: [data=digits, epochs=10]
sources: [{source: paper, keys: [epochs, seeds]}]
axes:
  data:
    label: Data
    values: {digits: {label: Digits, overrides: []}, letters: {label: Letters, overrides: [data=letters]}}
  optim:
    label: Optimizer
    values: {sgd: {label: SGD}, koala-m: {label: KOALA-M}, magic: {label: Magic}}
needs:
  - {match: {optim: magic}, reason: nobody wrote it}
rows: [optim]
columns: [data]
metrics:
  error: {label: Error (%), key: test_top1_error, published: top1_error, published_std: top1_error_std}
profiles:
  full: {seeds: [1, 2, 3]}
  smoke: {comparable: false, seeds: [1], overrides: [epochs=1]}
"""

GRID = "grid: {optim.lr: [1, 2]}"
TUNED = re.sub(r"\{label: (SGD|KOALA-M|Magic)\}", rf"{{label: \1, {GRID}}}", SPEC) + "choose: val_loss\n"
SGD, KOALA = {"data": "digits", "optim": "sgd"}, {"data": "digits", "optim": "koala-m"}

PUBLISHED = """
paper: paper
citation: "Somebody, Something, 2020"
tables:
  table1:
    title: A small table
    cells:
      - {data: digits, optim: sgd, top1_error: 5.0, top1_error_std: 0.5}
      - {data: digits, optim: koala-m, top1_error: 4.0}
"""


VERSIONS = {"torch": "2.15.0+cpu", "torchvision": "0.29.2", "timm": "1.0.31", "pytorch-optimizer": "4.1.0"}


def make_experiment(folder: Path, text: str = SPEC, name: str = "small") -> Experiment:
    """`text` as a checked experiment file."""
    path = Path(folder) / "experiments" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return load_experiment(path.parent, name)


def segment(**fields) -> dict:
    """A run's only part."""
    return {
        "from": 0, "to": 200, "numerics": 1, "versions": dict(VERSIONS),
        "git": {"commit": "a" * 40, "dirty": False}, "device": "CPU", "threads": 1, "compile": False, "ranks": 1,
        "backend": "portable", "load": [0.5, 1.0], "step_ms": 2.0,
        "seconds": {"start": 0.1, "train": 100.0, "eval": 1.0, "save": 0.0},
    } | fields  # fmt: skip


def make_row(cell: dict, seed: int = 1, error: float = 4.0, *, profile="full", status="finished", **fields) -> dict:
    """A run of ten epochs whose test error falls from 2 * error to error, one second an epoch."""
    point, history = fields.pop("point", {}), fields.pop("history", None)
    history = history or [
        {"epoch": float(e), "step": 20 * e, "seconds": float(e), "lr": 0.5, "test_top1_error": error * (2 - e / 10),
         "test_loss": 1.0 - e / 20, "filter_R": 2.0, "filter_P11": 4.0}
        for e in range(1, 11)
    ]  # fmt: skip
    final = {"test_top1_error": error, "val_loss": fields.pop("val_loss", 1.0)}
    record = {
        "schema": 2, "status": status, "name": "digits/resnet18/sgd", "config": {"select": "last"},
        "config_hash": "0123456789ab", "ranks": 1, "data": {"name": "digits", "fingerprint": "d", "revision": None},
        "segments": [segment()], "versions": {}, "started": "2026-01-01T00:00:00+00:00", "error": None, "steps": 200,
        "throughput": 10.0, "seed": seed, "precision": "fp32", "epochs": 10.0, "device": "CPU",
        "seconds": {"train": 100.0 + seed, "eval": 1.0}, "git": {"commit": "a" * 40, "dirty": False},
        "metrics": {"final": final, "best": {"test_top1_error": {"value": error / 2, "epoch": 9.0}}},
        "command": "python train.py optim=sgd", "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return row_of("small", profile, cell, point, {**record, "history": history, **fields})


def make_table(folder: Path, rows: list[dict], text: str = SPEC, profile: str = "full") -> Table:
    """The table of `text` and PUBLISHED with `rows`."""
    experiment = make_experiment(folder, text)
    published = Path(folder) / "published"
    published.mkdir(exist_ok=True)
    (published / "paper.yaml").write_text(PUBLISHED)
    return build(experiment, experiment.profile(profile), rows, load_published(published, experiment))
