"""From recorded runs to the samples of a cell: which may be compared, which grid point is shown, what each run adds."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from koala import numerics
from koala.tables.parts import Key, Metric

UNKNOWN = "unknown"
FLAT = 0.001  # of the metric that chooses: rates that differ by less are as good as each other
Versions = dict[str, set[str]]  # by library, and "numerics" for this suite


def versions(rows: Iterable[dict]) -> Versions:
    """Everything versioned that decides the rows' numbers, and each version that computed a part of them.

    That is this suite (koala.numerics) and the libraries that a run computes with. A run that was resumed after a
    change has two versions of something. The build of torch (+cpu, +cu130) is left out: the row's device names it.
    """
    result = defaultdict(set)
    for row in rows:
        target = (row["config"].get("optim") or {}).get("_target_", "")
        vit = (row["config"].get("model") or {}).get("family") == "vit"
        used = {
            "numerics": True,
            "torch": True,
            "torchvision": True,
            "timm": vit or target.startswith("timm."),
            "pytorch-optimizer": target.startswith(("pytorch_optimizer.", "koala.baselines.", "koala.extras.")),
            "curvlinops-for-pytorch": target.startswith("koala.baselines.kfac."),
        }
        for part in row.get("segments") or ({"versions": {}},):
            recorded = part["versions"] | {"numerics": str(numerics.version_of(part) or UNKNOWN)}
            for name in filter(used.get, used):
                result[name].add(recorded.get(name, UNKNOWN).split("+")[0])
    return dict(result)


def agree(rows: Iterable[dict]) -> bool:
    """Whether one version of everything, which is recorded, computed all rows, so that they may be compared."""
    return all(len(each) == 1 and UNKNOWN not in each for each in versions(rows).values())


def newest(rows: Iterable[dict]) -> Versions:
    """Of everything versioned, what the row that finished last was computed with."""
    result: Versions = {}
    for row in sorted(rows, key=lambda row: row["finished"]):
        result |= versions([row])
    return result


def versions_text(versions: Versions) -> str:
    """Versions for a reader: "numerics 1, torch 2.15.0"."""
    return ", ".join(f"{name} {' and '.join(sorted(each))}" for name, each in versions.items())


def uncommitted(row: dict) -> str:
    """Why the row can't be traced to a commit; "" if it can."""
    if not all(git.get("commit") for git in gits(row)):
        return "unknown commit"
    return "uncommitted changes" if any(git.get("dirty") for git in gits(row)) else ""


def gits(row: dict) -> list[dict]:
    """Of each part of the run, the commit that computed it and whether files differed from it."""
    return [part["git"] for part in row.get("segments") or ()] or [row.get("git") or {}]


def doubts(rows: list[dict], latest: Versions, tried: list[dict]) -> list[str]:
    """Why a cell's rows, whose rate those of `tried` chose, should not be compared with cells of the `latest` versions:
    nothing where all are of these, from clean commits."""
    marks = [f"{doubt} behind a run" for row in rows if (doubt := uncommitted(row))]
    computed = versions(rows)
    if UNKNOWN in computed.get("numerics", ()):
        marks.append("of unknown versions: recorded before records kept them")
    elif other := {name: each for name, each in computed.items() if each != latest[name]}:
        marks.append(f"computed by {versions_text(other)}, others by {versions_text({n: latest[n] for n in other})}")
    if not marks and rows and not (agree([*rows, *tried]) and not any(map(uncommitted, tried))):
        marks.append("runs of other versions or of uncommitted code chose its rate")
    return list(dict.fromkeys(marks))


def hardware(rows: list[dict]) -> list[str]:
    """A mark for runs of several devices, threads, ranks, backends or arithmetics: these may round differently."""
    kinds = sorted({_kind(part) for row in rows for part in row.get("segments") or ()})
    return [f"made on {len(kinds)} kinds of hardware or arithmetic: {'; '.join(kinds)}"] if len(kinds) > 1 else []


def _kind(part: dict) -> str:
    words = part["device"].split(", ")  # a CPU's name ends with its threads
    words += [f"{part['threads']} threads", f"{part['ranks']} ranks", part["backend"]]
    words.append(part.get("arithmetic", "arithmetic not recorded"))
    return ", ".join(dict.fromkeys(filter(None, words)))


@dataclass(frozen=True)
class Trial:
    """One point of a cell's grid: the choosing metric over the runs that `tried` it for the choice (None of one that
    failed), and all rows there are."""

    point: Key
    values: list[float | None]
    tried: list[dict]
    rows: list[dict]

    @property
    def value(self) -> float | None:
        """The mean of the values, or None where there is none or a run failed."""
        return statistics.fmean(self.values) if self.values and None not in self.values else None


def choose(rows: list[dict], metric: str) -> tuple[Key, list[dict], list[Trial]]:
    """The grid point with the lowest mean of `metric`, its rows by seed, and the trial of every point.

    A point with a diverged run stands behind every one without. Runs from before the cell had a grid are no trials:
    they have no point.
    """
    points = defaultdict(list)
    for row in [row for row in rows if row["point"]] or rows:
        points[tuple(sorted(row["point"].items()))].append(row)
    if not points:
        return {}, [], []
    shared = set.intersection(*({row["seed"] for row in group} for group in points.values()))
    trials = []
    for point in sorted(points):
        tried = [row for row in points[point] if row["seed"] in shared]
        values = [_chosen_by(row, metric) for row in tried]  # none: on other seeds nothing is compared
        trials.append(Trial(dict(point), values, tried, points[point]))
    best = min(trials, key=lambda trial: math.inf if trial.value is None else trial.value)
    return best.point, sorted(best.rows, key=lambda row: row["seed"]), trials if len(trials) > 1 else []


def at_edge(trials: list[Trial], point: Key) -> bool:
    """Whether `point` is the smallest or the largest of its grid, and better than the next one by more than FLAT, so
    that a wider grid may do better."""
    ends = [(trials[0], trials[1]), (trials[-1], trials[-2])] if trials else []
    for edge, inner in ends:
        if edge.point == point:
            return edge.value is None or inner.value is None or inner.value - edge.value > FLAT * abs(inner.value)
    return False


def _chosen_by(row: dict, key: str) -> float | None:
    """The run's value of the metric that chooses: its best where the run reports its best-validation model, else its
    last; None when it diverged."""
    if row["status"] == "diverged":
        return None
    best = row["config"].get("select") == "best-val"
    return at(row, f"metrics.best.{key}.value" if best else f"metrics.final.{key}")


def of_runs(metric: Metric, rows: list[dict], reference: dict[int, dict]) -> dict[int, float]:
    """What each run adds to a cell, by seed: its number, or infinity if it failed; not those that have none.

    Args:
        reference: for a relative metric, the runs by seed that it is divided by.
    """
    values = {row["seed"]: _sample(metric, row, reference.get(row["seed"])) for row in rows}
    return {seed: value for seed, value in values.items() if value is not None}


def _sample(metric: Metric, row: dict, base: dict | None) -> float | None:
    failed = {"lower": math.inf, "higher": -math.inf}.get(metric.better)
    if row["status"] == "diverged":
        return failed
    value = _reading(metric, row)
    if metric.relative is not None and value is not None:
        under = _reading(metric, base) if base and in_turn([row, base]) else None
        return value / under if under else None
    infinite = value is None and row["metrics"]["final"].get(metric.key, 0.0) is None  # as records write it
    return failed if infinite or value is None and metric.below is not None else value


def _reading(metric: Metric, row: dict) -> float | None:
    """The number that a finished run contributes; None when it has none."""
    points = [(point, point[metric.key]) for point in row["history"] if point.get(metric.key) is not None]
    if metric.record is not None:
        value = step_ms(row) if metric.record == "step_ms" else at(row, metric.record)
        if value is not None and metric.per is not None:
            value = value / row[metric.per] if row.get(metric.per) else None
    elif metric.below is not None:
        value = next((point[metric.unit] for point, reached in points if reached <= metric.below), None)
    elif metric.after_seconds is not None:
        value = next((reached for point, reached in reversed(points) if point["seconds"] <= metric.after_seconds), None)
    else:
        value = at(row, f"metrics.best.{metric.key}.value" if metric.at == "best" else f"metrics.final.{metric.key}")
    return None if value is None else metric.offset + metric.scale * value


def at(row: dict, path: str) -> Any:
    """The value of `row` at the end of a dotted path, or None."""
    for part in path.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def step_ms(row: dict) -> float | None:
    """Median milliseconds of a step, over the run's parts by their steps; None for a record that has none."""
    parts = [(part["to"] - part["from"], part["step_ms"]) for part in row.get("segments") or () if part["step_ms"]]
    steps = sum(count for count, _ in parts)
    return sum(count * value for count, value in parts) / steps if steps else None


def foreign_load(row: dict) -> float:
    """How much of the machine's load average was not the run's own threads, at most; 0 for a record without."""
    parts = row.get("segments") or ()
    return max((load - part["threads"] * part["ranks"] for part in parts for load in part["load"]), default=0.0)


def in_turn(rows: list[dict]) -> bool:
    """Whether one command measured all of `rows`, one at a time; else their times depend on what the machine did."""
    timings = {str(row.get("timing")) for row in rows}
    return len(timings) == 1 and all((row.get("timing") or {}).get("jobs") == 1 for row in rows)
