"""Where runs are not what their cell's settings say, or not what the full profile does: footnotes of the cell."""

import json
import math
from collections.abc import Iterator

from koala.run_keys import IMMATERIAL
from koala.tables import samples
from koala.tables.experiment import Experiment, override_values
from koala.tables.parts import ASSUMED, FULL, PAPER, Key, Profile, Setting

ANY = {"epochs", "max_steps", "precision", *IMMATERIAL}  # settings that may differ: a departure, or of no effect


def contradictions(experiment: Experiment, profile: Profile, rows: list[dict]) -> list[str]:
    """Literal settings of the rows' cell that their recorded configurations contradict."""
    if not profile.seeds:  # a table without a file requests nothing
        return []
    return list(dict.fromkeys(mark for row in rows for mark in _contradictions(experiment, profile, row)))


def _contradictions(experiment: Experiment, profile: Profile, row: dict) -> Iterator[str]:
    for name, text in override_values(experiment.overrides(row["cell"], profile, row["point"])).items():
        recorded = samples.at(row["config"], name)
        try:
            wanted = json.loads(text)
        except ValueError:
            wanted = text
        recorded = recorded.get("name") if isinstance(recorded, dict) else recorded  # of a group, such as optim
        literal = isinstance(recorded, (str, bool, int, float)) and "${" not in text
        if literal and recorded != wanted and name.partition(".")[0] not in ANY:
            yield f"recorded with {name}={recorded}, where this cell has {text}"


def departures(
    experiment: Experiment, profile: Profile, key: Key, rows: list[dict], settings: list[Setting]
) -> list[str]:
    """Where the runs of the cell `key` differ from the full profile (of a profile that does not compare with that: from
    itself), and where its setting is from: the paper, its code, or us; of a table of our own, the profile."""
    if not rows or not profile.seeds:
        return []
    judge = experiment.profile(FULL) if profile.comparable else profile
    answers = experiment.published and profile.comparable
    sources = {setting.key: setting.rule.source for setting in settings if answers}
    source = lambda name: sources.get(name, ASSUMED if answers else judge.name)  # noqa: E731
    wanted, seeds = override_values(experiment.overrides(key, judge, {})), len(judge.seeds)
    epochs, precision = wanted.get("epochs"), wanted.get("precision", "fp32")
    marks = [f"n = {len(rows)} ({source('seeds')}: {seeds})"] if len(rows) != seeds else []
    if (rates := len(experiment.cell(key, judge).settings)) > 1 and not any(row["point"] for row in rows):
        marks.append(f"one rate (the best of {rates} or more in the full profile)")
    for name, value in override_values(experiment.overrides(key, profile, {})).items():
        if value != wanted.get(name) and name.partition(".")[0] not in ANY:
            marks.append(f"{name} = {value} ({source(name)}: {wanted.get(name, 'not given')})")
    for row in rows:
        counts = row["status"] == "finished" and epochs and "max_steps" not in wanted
        if counts and not math.isclose(row["epochs"], float(epochs), rel_tol=1e-6):
            # The epochs of an axis are a column of the printed table itself.
            marks.append(f"{row['epochs']:.4g} epochs ({PAPER if 'epochs' in key else source('epochs')}: {epochs})")
        if row["precision"] != precision:
            marks.append(f"{row['precision']} ({source('precision')}: {precision})")
    return list(dict.fromkeys(marks))
