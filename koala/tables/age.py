"""Which versions computed a row, and whether they are those of its neighbours."""

from collections.abc import Iterable

from koala import numerics

UNKNOWN = "unknown"


def versions(row: dict) -> dict[str, set[str]]:
    """Everything versioned that decides the row's numbers, and each version that computed a part of it.

    That is this suite (its `numerics`) and the libraries that the run computes with. A run that was resumed after a
    change has two versions of something. The build of torch (+cpu, +cu130) is left out: the row's device says it.
    """
    found = {name: set() for name in ("numerics", *_libraries(row["config"]))}
    for part in row.get("segments") or ({"versions": {}},):
        known = part["versions"] | {"numerics": str(numerics.version_of(part) or UNKNOWN)}
        for name, there in found.items():
            there.add(known.get(name, UNKNOWN).split("+")[0])
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


def merged(rows: Iterable[dict]) -> dict[str, set[str]]:
    """The versions of all rows together."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, there in versions(row).items():
            found.setdefault(name, set()).update(there)
    return found


def agree(rows: Iterable[dict]) -> bool:
    """Whether one known version of everything computed all rows, so that they may be held against each other."""
    return all(len(there) == 1 and UNKNOWN not in there for there in merged(rows).values())


def newest(rows: Iterable[dict]) -> dict[str, set[str]]:
    """Of everything versioned, what the row that finished last was computed with."""
    found: dict[str, set[str]] = {}
    for row in sorted(rows, key=lambda row: row["finished"]):
        found |= versions(row)
    return found


def differing(row: dict, than: dict[str, set[str]]) -> bool:
    """Whether anything that decides the row's numbers is of other versions `than` these."""
    return any(there != than[name] for name, there in versions(row).items())


def text(versions: dict[str, set[str]]) -> str:
    """Versions for a reader: "numerics 1, torch 2.15.0"."""
    return ", ".join(f"{name} {' and '.join(sorted(there))}" for name, there in versions.items())


def doubts(row: dict) -> list[str]:
    """Why the row can't be traced to a commit, if so."""
    gits = [part["git"] for part in row.get("segments") or ()] or [row.get("git") or {}]
    if not all(git.get("commit") for git in gits):
        return ["unknown commit"]
    return ["uncommitted changes"] if any(git.get("dirty") for git in gits) else []


def marks(rows: list[dict], latest: dict[str, set[str]], tried: Iterable[dict] = ()) -> list[str]:
    """What must be said of a cell's rows: `doubts_of` them, and in how many ways they were made."""
    found = doubts_of(rows, latest, tried)
    ways = {way for row in rows for way in _ways(row)}
    if len(ways) > 1:
        found.append(f"made in {len(ways)} ways: {'; '.join(sorted(ways))}")
    return found


def doubts_of(rows: list[dict], latest: dict[str, set[str]], tried: Iterable[dict] = ()) -> list[str]:
    """Why a cell's rows, whose rate those of `tried` chose, should not be held against cells of the `latest` versions:
    nothing where all are of these, from clean commits."""
    found, there = [f"{doubt} behind a run" for row in rows for doubt in doubts(row)], merged(rows)
    if UNKNOWN in there.get("numerics", ()):
        found.append("of unknown versions: recorded before records kept them")
    elif other := {name: there[name] for name in there if there[name] != latest[name]}:
        found.append(f"computed by {text(other)}, others by {text({name: latest[name] for name in other})}")
    if not found and rows and not (agree([*rows, *tried]) and not any(map(doubts, tried))):
        found.append("runs of other versions or of uncommitted code chose its rate")
    return list(dict.fromkeys(found))


def _ways(row: dict) -> set[str]:
    """Device, threads, ranks, implementation and arithmetic: none changes what is computed, but all may round it."""
    return {
        f"{part['device']}, {part['threads']} threads, {part['ranks']} ranks, {part['backend']}"
        + (f", {part['arithmetic']}" if "arithmetic" in part else "")
        for part in row.get("segments") or ()
    }
