"""Fair search of one rate per optimizer, decided by the records alone, so that it resumes where it was stopped.

All optimizers that are compared get the same number of trials. While the best trial of any of them is at an edge of its
grid, and better than the next one (samples.at_edge), each gets one more: outside of the edge where the best is there,
else between the best and its better neighbour.
Then each is run with the remaining seeds at the best rate, which validation chose.
"""

import math

from koala.reproduce.plan import Plan
from koala.tables.parts import Cell, Key, of_cell
from koala.tables.samples import Trial, at_edge, choose

ROUNDS = 6  # a grid is widened at most so often; then a person should check it


def grow(plan: Plan) -> bool:
    """Adds the runs that follow from the records of the present ones; returns whether there are any."""
    rows, added = plan.rows(), False
    for name, samples in plan.tables().items():
        spec, profile = samples[0].spec, samples[0].profile
        groups: dict[str, list[Cell]] = {}  # of cells that are compared with each other
        for cell in plan.cells[name]:
            if cell.runs and len(cell.settings) > 1:
                groups.setdefault(str(spec.rest(cell.key)), []).append(cell)
        for cells in groups.values():
            keys = [cell.key for cell in cells]
            if any(sample.run.record() is None for sample in samples if sample.key in keys):
                continue  # not all trials have ended
            choices = [choose([row for row in rows if (row["table"], row["cell"]) == (name, key)], spec.choose)
                     for key in keys]  # fmt: skip
            rounds = len(choices[0][2]) - len(cells[0].settings)
            widen = rounds < ROUNDS and any(at_edge(trials, point) for point, _, trials in choices)
            for cell, (point, _, trials) in zip(cells, choices, strict=True):
                point = _further(cell, trials) if widen else point
                seeds = plan.seeds(profile)[: of_cell(profile.trial_seeds, cell.key) if widen else None]
                added |= plan.add(spec, profile, cell.key, point, seeds)
    return added


def _further(cell: Cell, trials: list[Trial]) -> Key:
    """The next trial's point: a factor outside the edge, or the geometric middle on the better side of the best."""
    [name] = cell.settings[0][0]
    rates = [trial.point[name] for trial in trials]
    values = [math.inf if trial.value is None else trial.value for trial in trials]
    given = sorted(point[name] for point, _ in cell.settings)
    factor = (given[-1] / given[0]) ** (1 / (len(given) - 1))
    best = values.index(min(values))
    if best == 0 or min(values) == math.inf:  # where every rate diverges, smaller ones may not
        rate = rates[0] / factor
    elif best == len(rates) - 1:
        rate = rates[-1] * factor
    else:
        side = best - 1 if values[best - 1] <= values[best + 1] else best + 1
        rate = math.sqrt(rates[best] * rates[side])
    return {name: float(f"{rate:.3g}")}
