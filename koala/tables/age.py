"""Which code computed a row, and whether it is the code of today."""

from collections.abc import Iterable

from koala import fingerprint

UNKNOWN = "unknown"  # rows of schema 1 do not say
NAMED = ("torch", "torchvision", "timm", "pytorch-optimizer", "curvlinops-for-pytorch")  # see fingerprint.decides


def present() -> str:
    """The code that runs made now are from."""
    return code(fingerprint.sources(), fingerprint.versions(), fingerprint.sources(fingerprint.BASELINES))


def code(sources: str, versions: dict[str, str], baselines: str) -> str:
    """What decides numbers, in words: digest of our sources, versions of what computes beneath them, digest of our
    baselines.

    The build of torch (+cpu, +cu130) is left out: the device says it.
    """
    beneath = (f"{name} {versions.get(name, UNKNOWN).split('+')[0]}" for name in NAMED)
    return " ".join((sources, *beneath, f"baselines {baselines}"))


def behind(row: dict, code: str) -> str:
    """What of `code` decides the numbers of the row: not the versions of other optimizers' and models' libraries."""
    sources, *words = code.split()
    known = dict(zip(words[::2], words[1::2], strict=True))
    return " ".join([sources, *(f"{name} {known.get(name, UNKNOWN)}" for name in fingerprint.decides(row["config"]))])


def codes(row: dict) -> set[str]:
    """The code behind each part of a run; a run that was resumed after a change has two."""
    parts = row.get("segments") or ()
    found = (code(part["sources"], part["versions"], part.get("baselines", UNKNOWN)) for part in parts)
    return {behind(row, one) for one in found} or {UNKNOWN}


def is_of(row: dict, code: str) -> bool:
    """Whether all of a run is from `code`, as far as that decides its numbers."""
    return codes(row) == {behind(row, code)}


def sound(row: dict, code: str) -> bool:
    """Whether the row is from clean commits of `code`."""
    return is_of(row, code) and not doubts(row)


def doubts(row: dict) -> list[str]:
    """Why the row can't be traced to a commit, if so."""
    gits = [part["git"] for part in row.get("segments") or ()] or [row.get("git") or {}]
    if not all(git.get("commit") for git in gits):
        return ["unknown commit"]
    return ["uncommitted changes"] if any(git.get("dirty") for git in gits) else []


def age(rows: list[dict], today: str, tried: Iterable[dict] = ()) -> list[str]:
    """What must be said of the code behind a cell's rows, whose rate those of `tried` chose: nothing, when all of them
    are from that of today."""
    found = set().union(*(codes(row) for row in rows))
    older = set().union(*(codes(row) - {behind(row, today)} for row in rows))
    marks = [f"{doubt} behind a run" for row in rows for doubt in doubts(row)]
    if older:
        marks.append("older code" if UNKNOWN not in found else "older code (recorded before records knew theirs)")
    if len(found) > 1:
        marks.append(f"{len(found)} states of the code behind one cell")
    if not marks and not all(sound(row, today) for row in tried):
        marks.append("older or uncommitted code behind the choice of its rate")
    ways = {way for row in rows for way in _ways(row)}
    if len(ways) > 1:
        marks.append(f"made in {len(ways)} ways: {'; '.join(sorted(ways))}")
    return list(dict.fromkeys(marks))


def _ways(row: dict) -> set[str]:
    """Device, threads, ranks and implementation: none of them changes what is computed, but all may round it."""
    return {
        f"{part['device']}, {part['threads']} threads, {part['ranks']} ranks, {part['backend']}"
        for part in row.get("segments") or ()
    }
