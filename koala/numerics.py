"""Version of what this suite computes: equal versions and equal libraries give equal losses, but for rounding.

Raise it by a line in HISTORY when a change makes a loss in tests/golden depart on purpose, and write those losses anew
with `python scripts/loss_compare.py --write`. Records keep it for each part of a run; numbers of two versions are not
compared. Nothing else makes a number old: not a new name, a faster kernel or an edit of a comment.
"""

HISTORY = {
    1: "the first that records keep",
}
VERSION = max(HISTORY)

# Before they kept a version, records kept a digest of the source files. This one's numbers are those of version 1.
_DIGESTS = {"b1039ac938c8dc77": 1}


def version_of(segment: dict) -> int | None:
    """Version that computed this part of a run (koala.records.Segment); None if its record does not say."""
    return segment.get("numerics") or _DIGESTS.get(segment.get("sources"))
