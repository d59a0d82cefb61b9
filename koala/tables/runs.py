"""A table of any finished runs, without an experiment file: a row for each configuration, a column for each task."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from koala.errors import ConfigError
from koala.records import ENDED, RECORD, read_history, read_record
from koala.runs.schema import IMMATERIAL
from koala.tables.build import Table, build
from koala.tables.measured import row_of
from koala.tables.metric import Metric, Scalar
from koala.tables.spec import FULL, Axis, Profile, Rule, Spec, Value

WANTED = {  # the metrics of a table, each by the first column that any run of a task has, and what heads it then
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

    Of a run that is there more than once (made again, its folder moved aside) the one that finished last counts.

    Raises:
        ConfigError: no folder, no finished run below them, or a record that is none (names it).
    """
    found: dict[tuple[str, int], dict] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ConfigError(f"--runs {folder}: is not a folder of runs")
        for path in sorted(folder.rglob(RECORD)):
            record = read_record(path.parent)
            if record["status"] not in ENDED:
                continue
            run = record["config_hash"], record["seed"]
            if run not in found or record["finished"] > found[run]["finished"]:
                found[run] = {**record, "history": read_history(path.parent)}
    if not found:
        raise ConfigError(f"--runs {' '.join(map(str, folders))}: no finished run below (a folder with {RECORD})")
    records = list(found.values())
    labels = _labels(records)
    cells = [{"task": _task(record), "run": labels[record["config_hash"]]} for record in records]
    spec = _spec(records, cells)
    profile = spec.profile(FULL)
    rows = [row_of(spec.name, FULL, cell, {}, record) for cell, record in zip(cells, records, strict=True)]
    return build(spec, profile, rows, None)


def _task(record: dict) -> str:
    """Data and network, as in the name data/network/optimizer."""
    return record["name"].rpartition("/")[0]


def _labels(records: list[dict]) -> dict[str, str]:
    """A name for each configuration: its optimizer's, and what sets it apart from others of that optimizer and task."""
    kinds: dict[str, dict[str, dict[str, Scalar]]] = {}
    for record in records:
        kinds.setdefault(record["name"], {})[record["config_hash"]] = dict(_flat(record["config"]))
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


def _flat(config: dict, before: str = ""):
    for key, value in config.items():
        if not before and key in IMMATERIAL:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _spec(records: list[dict], cells: list[dict[str, Scalar]]) -> Spec:
    """What an experiment file of these runs would say."""
    optimizers = {cell["run"]: record["name"].rpartition("/")[2] for cell, record in zip(cells, records, strict=True)}
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    values = [Value(run, run, (f"optim={optimizer}",), {}) for run, optimizer in optimizers.items()]
    axes = (
        Axis("task", "Task", tuple(Value(task, task, (), {}) for task in tasks)),
        Axis("run", "Optimizer", tuple(values)),
    )
    metrics = []
    for name, columns in WANTED.items():
        there = {task: set() for task in tasks}
        for cell, record in zip(cells, records, strict=True):
            there[cell["task"]] |= record["metrics"]["final"].keys()
        keys = {task: next((key for key in columns if key in there[task]), None) for task in tasks}
        if any(keys.values()):  # a task without, whose runs diverged at once, has a column of failures
            usual = next(key for key in columns if key in keys.values())
            keys = {task: key or usual for task, key in keys.items()}
            heads = {task: columns[key] for task, key in keys.items()}
            by_task = (("key", "task", keys), ("label", "task", heads))
            metrics.append(Metric(name, columns[usual], key=usual, by_cell=by_task))
    metrics.append(Metric("seconds", "Seconds of training", record="seconds.train", digits=1, better="neither"))
    there = {(cell["task"], cell["run"]) for cell in cells}
    absent = [
        Rule({"task": (task,), "run": (run,)}) for task in tasks for run in optimizers if (task, run) not in there
    ]
    digest = hashlib.sha256(
        "\n".join(sorted(f"{record['config_hash']} {record['seed']}" for record in records)).encode()
    )
    return Spec(
        name=f"runs-{digest.hexdigest()[:8]}", path=Path(), title=f"{len(records)} finished runs", caption="",
        assumptions=(), sources=(), published=None, base=(), axes=axes, when=(), exclude=tuple(absent), needs=(),
        metrics=tuple(metrics), choose="", rows=("run",), columns=("task",), compare="run", figures=(),
        profiles={FULL: Profile(FULL, "Runs as they were found.", seeds=())},
    )  # fmt: skip
