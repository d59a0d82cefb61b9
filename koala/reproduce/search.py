"""Fair search of one rate per optimizer, decided by the records alone, so that it resumes where it was stopped.

All optimizers that are compared get the same number of trials. While the best trial of any of them is at an edge of its
grid, each gets one more: outside of the edge where the best is there, else between the best and its better neighbour.
Then each is run with the remaining seeds at the best rate, which validation chose.
"""

import math

from koala.reproduce.plan import Plan, Sample
from koala.tables.choose import Trial, at_edge
from koala.tables.choose import choose as choose_point
from koala.tables.experiment import Cell

ROUNDS = 6  # a grid is widened at most so often; then a person should check it


def grow(plan: Plan) -> bool:
    """Adds the runs that follow from the records of the present ones; returns whether there are any."""
    rows = plan.rows()
    added = False
    for name, samples in plan.tables().items():
        spec, profile = samples[0].spec, samples[0].profile
        measured = [row for row in rows if row["table"] == name]
        for cells in _compared(samples):
            if any(sample.run.record() is None for sample in samples if sample.key in [cell.key for cell in cells]):
                continue  # not all trials have ended
            searches = [
                _Search(cell, [row for row in measured if row["cell"] == cell.key], spec.choose) for cell in cells
            ]
            widen = any(search.open for search in searches) and searches[0].rounds < ROUNDS
            for search in searches:
                point = search.further() if widen else search.best.point
                seeds = plan.seeds(profile)[: profile.trials(search.cell.key) if widen else None]
                added |= plan.add(spec, profile, search.cell.key, point, seeds)
    return added


def _compared(samples: list[Sample]) -> list[list[Cell]]:
    """The cells of a table that have a grid, those that are compared with each other together."""
    spec, profile = samples[0].spec, samples[0].profile
    groups: dict[str, list[Cell]] = {}
    for cell in spec.cells(profile):
        if cell.runs and len(cell.settings) > 1:
            groups.setdefault(str(spec.rest(cell.key)), []).append(cell)
    return list(groups.values())


class _Search:
    """One cell's trials, sorted by their rate."""

    def __init__(self, cell: Cell, rows: list[dict], choose: str):
        self.cell = cell
        self.trials: list[Trial] = choose_point(rows, choose)[2]
        [self.key] = cell.settings[0][0]
        self.rates = [trial.point[self.key] for trial in self.trials]
        self.values = [math.inf if trial.value is None else trial.value for trial in self.trials]
        self.best = self.trials[self.values.index(min(self.values))]

    @property
    def rounds(self) -> int:
        """How often the grid was widened."""
        return len(self.trials) - len(self.cell.settings)

    @property
    def open(self) -> bool:
        """Whether the best may lie outside of the grid."""
        return at_edge(self.trials, self.best.point)

    def further(self) -> dict:
        """The next trial's point: a factor outside the edge, or the geometric middle on the better side of the best."""
        at = self.trials.index(self.best)
        given = sorted(point[self.key] for point, _ in self.cell.settings)
        factor = (given[-1] / given[0]) ** (1 / (len(given) - 1))
        if at == 0 or min(self.values) == math.inf:  # where every rate diverges, smaller ones may not
            rate = self.rates[0] / factor
        elif at == len(self.trials) - 1:
            rate = self.rates[-1] * factor
        else:
            side = at - 1 if self.values[at - 1] <= self.values[at + 1] else at + 1
            rate = math.sqrt(self.rates[at] * self.rates[side])
        return {self.key: float(f"{rate:.3g}")}
