"""A table of any finished runs, without an experiment file: a row for each configuration, a column for each task."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from koala.metrics import LABELS, METRICS
from koala.run_keys import IMMATERIAL
from koala.tables.experiment import Experiment
from koala.tables.measured import read_runs, row_of
from koala.tables.parts import FULL, Key, Profile
from koala.tables.table import Table, build

# The columns of a table: of each, the first that any run of a task has. The main metric goes before its losses.
MAIN = [column for split in ("test", "val") for metric in METRICS.values() if metric.printed and metric.name != "loss"
        for column in metric.columns([split])]  # fmt: skip
WANTED = {"metric": MAIN, "loss": [f"{split}_loss" for split in ("test", "val", "train")]}


def table_of_runs(folders: Iterable[Path]) -> Table:
    """The table of all finished runs below `folders`, grouped by what they were run with; seeds are its samples.

    Raises:
        ConfigError: no folder, no finished run below them, or a record that is none (names it).
    """
    records = read_runs(folders)
    labels = _labels(records)
    cells = [{"task": record["name"].rpartition("/")[0], "run": labels[record["config_hash"]]} for record in records]
    experiment = _experiment(records, cells)
    rows = [row_of(experiment.name, FULL, cell, {}, record) for cell, record in zip(cells, records, strict=True)]
    return build(experiment, experiment.profile(FULL), rows)


def _labels(records: list[dict]) -> dict[str, str]:
    """A name for each configuration: its optimizer's, and what sets it apart from others of that optimizer and task."""
    kinds: dict[str, dict[str, Key]] = {}
    for record in records:
        material = {key: value for key, value in record["config"].items() if key not in IMMATERIAL}
        kinds.setdefault(record["name"], {})[record["config_hash"]] = _flat(material)
    labels = {}
    for name, configs in kinds.items():
        keys = sorted(set().union(*configs.values()))
        differ = [key for key in keys if len({str(config.get(key)) for config in configs.values()}) > 1]
        words = {
            digest: " ".join([name.rpartition("/")[2], *(f"{key}={config.get(key)}" for key in differ)])
            for digest, config in configs.items()
        }
        # What is in the hash alone, such as other data in the same folder, has no key to tell the two by.
        same = Counter(words.values())
        labels |= {digest: text if same[text] == 1 else f"{text} {digest}" for digest, text in words.items()}
    return labels


def _flat(config: dict, before: str = "") -> Key:
    parts = [_flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
             for key, value in config.items()]  # fmt: skip
    return {name: leaf for part in parts for name, leaf in part.items()}


def _experiment(records: list[dict], cells: list[Key]) -> Experiment:
    """What an experiment file of these runs would be."""
    tasks: dict[str, set[str]] = {cell["task"]: set() for cell in cells}
    runs = {}
    for cell, record in zip(cells, records, strict=True):
        tasks[cell["task"]] |= record["metrics"]["final"].keys()
        runs[cell["run"]] = {"overrides": [f"optim={record['name'].rpartition('/')[2]}"]}
    metrics: dict[str, dict] = {}
    for name, columns in WANTED.items():
        keys = {task: next((key for key in columns if key in final), None) for task, final in tasks.items()}
        if usual := next((key for key in columns if key in keys.values()), None):
            keys = {task: key or usual for task, key in keys.items()}  # of a task whose runs all diverged at once
            labels = {task: LABELS[key][0].upper() + LABELS[key][1:] for task, key in keys.items()}
            metrics[name] = {"key": {"task": keys}, "label": {"task": labels}}
    metrics["seconds"] = {"label": "Seconds of training", "record": "seconds.train", "digits": 1, "better": "neither"}
    there = {(cell["task"], cell["run"]) for cell in cells}
    absent = [{"match": {"task": task, "run": [run for run in runs if (task, run) not in there]}} for task in tasks]
    digest = hashlib.sha256("\n".join(sorted(f"{row['config_hash']} {row['seed']}" for row in records)).encode())
    return Experiment.model_validate({
        "name": f"runs-{digest.hexdigest()[:8]}", "title": f"{len(records)} finished runs", "rows": ["run"],
        "columns": ["task"], "metrics": metrics, "exclude": absent,
        "axes": {"task": {"label": "Task", "values": {task: {"overrides": []} for task in tasks}},
                 "run": {"label": "Optimizer", "values": runs}},
        "profiles": {FULL: Profile.model_construct(name=FULL, about="Runs as they were found.", seeds=(), timed=True)},
    })  # fmt: skip
