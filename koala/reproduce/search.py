"""Fair search of one rate per optimizer, decided by the records there are, so that it goes on where it was stopped.

All optimizers that are compared get the same number of trials. While the best trial of any of them is at an edge of its
grid, each gets one more: beyond the edge where that is where the best is, else between the best and its better
neighbour. Then each is run with the remaining seeds at its best, which validation chose.
"""

import math

from koala.reproduce.plan import Plan
from koala.tables.build import Trial, at_edge, choose_point
from koala.tables.spec import Cell

ROUNDS = 6  # that a grid is widened before somebody should look at it


def grow(plan: Plan) -> bool:
    """Adds the runs that the records of the present ones ask for; returns whether there are any."""
    rows = plan.rows()
    added = False
    for name, places in plan.tables().items():
        spec, profile = places[0].spec, places[0].profile
        tuned = [cell for cell in spec.cells(profile) if cell.runs and len(cell.settings) > 1]
        groups: dict[str, list[Cell]] = {}
        for cell in tuned:
            groups.setdefault(str(spec.rest(cell.key)), []).append(cell)
        for cells in groups.values():
            members = [[place for place in places if place.key == cell.key] for cell in cells]
            if any(place.run.record() is None for member in members for place in member):
                continue  # not all trials have ended: it is too early to say
            searches = [
                _Search(cell, choose_point([row for row in rows if row["table"] == name and row["cell"] == cell.key],
                                           spec.choose)[2]) for cell in cells
            ]  # fmt: skip
            widen = any(search.open for search in searches) and searches[0].rounds < ROUNDS
            for search in searches:
                point = search.further() if widen else search.best.point
                seeds = plan.seeds(profile)[: profile.trials(search.cell.key) if widen else None]
                added |= plan.add(spec, profile, search.cell.key, point, seeds)
    return added


class _Search:
    """One cell's trials, sorted by their rate."""

    def __init__(self, cell: Cell, trials: list[Trial]):
        self.cell, self.trials = cell, trials
        [self.key] = cell.settings[0][0]
        self.rates = [trial.point[self.key] for trial in trials]
        self.values = [math.inf if trial.value is None else trial.value for trial in trials]
        self.best = trials[self.values.index(min(self.values))]

    @property
    def rounds(self) -> int:
        return len(self.trials) - len(self.cell.settings)

    @property
    def open(self) -> bool:
        """Whether the best may lie beyond."""
        return at_edge(self.trials, self.best.point)

    def further(self) -> dict:
        """The next trial's point: a factor beyond the edge, or the geometric middle on the better side of the best."""
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
