"""A table of any finished runs, without an experiment file: a row for each configuration, a column for each task."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from koala.tables.experiment import Experiment
from koala.tables.measured import read_runs, row_of
from koala.tables.parts import Key, Profile, Scalar
from koala.tables.rules import FULL
from koala.tables.table import Table, build

WANTED = {  # the metrics of a table, each by the first column that any run of a task has, and its heading then
    "metric": {
        "test_top1_error": "Test error (%)",
        "test_ppl": "Test perplexity",
        "val_top1_error": "Validation error (%)",
        "val_ppl": "Validation perplexity",
        "fid": "FID",
        "feature_distance": "Feature distance",
    },
    "loss": {"test_loss": "Test loss", "val_loss": "Validation loss", "train_loss": "Training loss"},
}


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
    from koala.runs.schema import IMMATERIAL  # with torch: a table of experiments/ is rendered without

    kinds: dict[str, dict[str, Key]] = {}
    for record in records:
        material = {key: value for key, value in record["config"].items() if key not in IMMATERIAL}
        kinds.setdefault(record["name"], {})[record["config_hash"]] = dict(_flat(material))
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


def _flat(config: dict, before: str = "") -> Iterator[tuple[str, Scalar]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _experiment(records: list[dict], cells: list[Key]) -> Experiment:
    """What an experiment file of these runs would be."""
    optimizers = {cell["run"]: record["name"].rpartition("/")[2] for cell, record in zip(cells, records, strict=True)}
    tasks = {cell["task"]: set() for cell in cells}
    for cell, record in zip(cells, records, strict=True):
        tasks[cell["task"]] |= record["metrics"]["final"].keys()
    metrics = {}
    for name, columns in WANTED.items():
        keys = {task: next((key for key in columns if key in there), None) for task, there in tasks.items()}
        if any(keys.values()):  # a task without, whose runs diverged at once, has a column of failures
            usual = next(key for key in columns if key in keys.values())
            keys = {task: key or usual for task, key in keys.items()}
            metrics[name] = {"key": {"task": keys}, "label": {"task": {task: columns[keys[task]] for task in tasks}}}
    metrics["seconds"] = {"label": "Seconds of training", "record": "seconds.train", "digits": 1, "better": "neither"}
    absent = [{"match": {"task": task, "run": run}} for task in tasks for run in optimizers
              if {"task": task, "run": run} not in cells]  # fmt: skip
    digest = hashlib.sha256("\n".join(sorted(f"{row['config_hash']} {row['seed']}" for row in records)).encode())
    runs = {run: {"overrides": [f"optim={optimizer}"]} for run, optimizer in optimizers.items()}
    return Experiment.model_validate({
        "name": f"runs-{digest.hexdigest()[:8]}", "title": f"{len(records)} finished runs", "rows": ["run"],
        "columns": ["task"], "metrics": metrics, "exclude": absent,
        "axes": {"task": {"label": "Task", "values": {task: {"overrides": []} for task in tasks}},
                 "run": {"label": "Optimizer", "values": runs}},
        "profiles": {FULL: Profile.model_construct(name=FULL, about="Runs as they were found.", seeds=(), timed=True)},
    })  # fmt: skip
