"""Which versions computed a run, and whether they are those of the runs that it is compared with."""

from collections.abc import Iterable

from koala import numerics

UNKNOWN = "unknown"
Versions = dict[str, set[str]]  # by library, and "numerics" for this suite


def versions(rows: Iterable[dict]) -> Versions:
    """Everything versioned that decides the rows' numbers, and each version that computed a part of them.

    That is this suite (koala.numerics) and the libraries that a run computes with. A run that was resumed after a
    change has two versions of something. The build of torch (+cpu, +cu130) is left out: the row's device names it.
    """
    result: Versions = {}
    for row in rows:
        names = ("numerics", *_libraries(row["config"]))
        for part in row.get("segments") or ({"versions": {}},):
            recorded = part["versions"] | {"numerics": str(numerics.version_of(part) or UNKNOWN)}
            for name in names:
                result.setdefault(name, set()).add(recorded.get(name, UNKNOWN).split("+")[0])
    return result


def _libraries(config: dict) -> list[str]:
    target = (config.get("optim") or {}).get("_target_", "")
    used = {
        "torch": True,
        "torchvision": True,
        "timm": (config.get("model") or {}).get("family") == "vit" or target.startswith("timm."),
        "pytorch-optimizer": target.startswith(("pytorch_optimizer.", "koala.baselines.", "koala.extras.")),
        "curvlinops-for-pytorch": target.startswith("koala.baselines.kfac."),
    }
    return [name for name, uses in used.items() if uses]


def agree(rows: Iterable[dict]) -> bool:
    """Whether one version of everything, which is recorded, computed all rows, so that they may be compared."""
    return all(len(each) == 1 and UNKNOWN not in each for each in versions(rows).values())


def newest(rows: Iterable[dict]) -> Versions:
    """Of everything versioned, what the row that finished last was computed with."""
    result: Versions = {}
    for row in sorted(rows, key=lambda row: row["finished"]):
        result |= versions([row])
    return result


def present(rows: list[dict]) -> list[dict]:
    """The rows that are of the newest versions among them."""
    latest = newest(rows)
    return [row for row in rows if all(each == latest[name] for name, each in versions([row]).items())]


def text(versions: Versions) -> str:
    """Versions for a reader: "numerics 1, torch 2.15.0"."""
    return ", ".join(f"{name} {' and '.join(sorted(each))}" for name, each in versions.items())


def uncommitted(row: dict) -> str | None:
    """Why the row can't be traced to a commit, if so."""
    gits = [part["git"] for part in row.get("segments") or ()] or [row.get("git") or {}]
    if not all(git.get("commit") for git in gits):
        return "unknown commit"
    return "uncommitted changes" if any(git.get("dirty") for git in gits) else None


def doubts(rows: list[dict], latest: Versions, tried: list[dict]) -> list[str]:
    """Why a cell's rows, whose rate those of `tried` chose, should not be compared with cells of the `latest` versions:
    nothing where all are of these, from clean commits."""
    marks = [f"{doubt} behind a run" for row in rows if (doubt := uncommitted(row))]
    computed = versions(rows)
    if UNKNOWN in computed.get("numerics", ()):
        marks.append("of unknown versions: recorded before records kept them")
    elif other := {name: each for name, each in computed.items() if each != latest[name]}:
        marks.append(f"computed by {text(other)}, others by {text({name: latest[name] for name in other})}")
    if not marks and rows and not (agree([*rows, *tried]) and not any(map(uncommitted, tried))):
        marks.append("runs of other versions or of uncommitted code chose its rate")
    return list(dict.fromkeys(marks))


def hardware(rows: list[dict]) -> list[str]:
    """A mark for runs of several devices, threads, ranks, backends or arithmetics: these may round differently."""
    ways = {
        f"{part['device']}, {part['threads']} threads, {part['ranks']} ranks, {part['backend']}"
        + (f", {part['arithmetic']}" if "arithmetic" in part else "")
        for row in rows
        for part in row.get("segments") or ()
    }
    return [f"made in {len(ways)} ways: {'; '.join(sorted(ways))}"] if len(ways) > 1 else []
