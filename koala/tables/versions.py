"""Which versions computed a run, and whether they are those of the runs that it is compared with."""

from collections.abc import Iterable

from koala import numerics

UNKNOWN = "unknown"
Versions = dict[str, set[str]]  # by library, and "numerics" for this suite


def versions(row: dict) -> Versions:
    """Everything versioned that decides the row's numbers, and each version that computed a part of it.

    That is this suite (koala.numerics) and the libraries that the run computes with. A run that was resumed after a
    change has two versions of something. The build of torch (+cpu, +cu130) is left out: the row's device names it.
    """
    found: Versions = {name: set() for name in ("numerics", *_libraries(row["config"]))}
    for part in row.get("segments") or ({"versions": {}},):
        kept = part["versions"] | {"numerics": str(numerics.version_of(part) or UNKNOWN)}
        for name, there in found.items():
            there.add(kept.get(name, UNKNOWN).split("+")[0])
    return found


def _libraries(config: dict) -> list[str]:
    target = (config.get("optim") or {}).get("_target_", "")
    found = ["torch", "torchvision"]
    if (config.get("model") or {}).get("family") == "vit" or target.startswith("timm."):
        found.append("timm")
    if target.startswith(("pytorch_optimizer.", "koala.baselines.")):
        found.append("pytorch-optimizer")
    if target.startswith("koala.baselines.kfac."):
        found.append("curvlinops-for-pytorch")
    return found


def merged(rows: Iterable[dict]) -> Versions:
    """The versions of all rows together."""
    found: Versions = {}
    for row in rows:
        for name, there in versions(row).items():
            found.setdefault(name, set()).update(there)
    return found


def agree(rows: Iterable[dict]) -> bool:
    """Whether one known version of everything computed all rows, so that they may be compared."""
    return all(len(there) == 1 and UNKNOWN not in there for there in merged(rows).values())


def newest(rows: Iterable[dict]) -> Versions:
    """Of everything versioned, what the row that finished last was computed with."""
    found: Versions = {}
    for row in sorted(rows, key=lambda row: row["finished"]):
        found |= versions(row)
    return found


def present(rows: list[dict]) -> list[dict]:
    """The rows that are of the newest versions among them."""
    latest = newest(rows)
    return [row for row in rows if all(there == latest[name] for name, there in versions(row).items())]


def text(versions: Versions) -> str:
    """Versions for a reader: "numerics 1, torch 2.15.0"."""
    return ", ".join(f"{name} {' and '.join(sorted(there))}" for name, there in versions.items())


def uncommitted(row: dict) -> str | None:
    """Why the row can't be traced to a commit, if so."""
    gits = [part["git"] for part in row.get("segments") or ()] or [row.get("git") or {}]
    if not all(git.get("commit") for git in gits):
        return "unknown commit"
    return "uncommitted changes" if any(git.get("dirty") for git in gits) else None


def doubts(rows: list[dict], latest: Versions, tried: Iterable[dict] = ()) -> list[str]:
    """Why a cell's rows, whose rate those of `tried` chose, should not be compared with cells of the `latest` versions:
    nothing where all are of these, from clean commits."""
    found, there = [f"{doubt} behind a run" for row in rows if (doubt := uncommitted(row))], merged(rows)
    if UNKNOWN in there.get("numerics", ()):
        found.append("of unknown versions: recorded before records kept them")
    elif other := {name: there[name] for name in there if there[name] != latest[name]}:
        found.append(f"computed by {text(other)}, others by {text({name: latest[name] for name in other})}")
    tried = list(tried)
    if not found and rows and not (agree([*rows, *tried]) and not any(map(uncommitted, tried))):
        found.append("runs of other versions or of uncommitted code chose its rate")
    return list(dict.fromkeys(found))


def ways(rows: list[dict]) -> list[str]:
    """A mark for runs of several devices, threads, ranks, backends or arithmetics: these may round differently."""
    found = {
        f"{part['device']}, {part['threads']} threads, {part['ranks']} ranks, {part['backend']}"
        + (f", {part['arithmetic']}" if "arithmetic" in part else "")
        for row in rows
        for part in row.get("segments") or ()
    }
    return [f"made in {len(found)} ways: {'; '.join(sorted(found))}"] if len(found) > 1 else []
