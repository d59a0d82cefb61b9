"""What a command would do: runs, commands, blocked cells and cost."""

from collections import defaultdict
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from koala.reproduce.cost import run_flops, total
from koala.reproduce.plan import Plan, Run, Sample
from koala.reproduce.search import ROUNDS
from koala.tables.parts import of_cell


def show_plan(plan: Plan, console: Console) -> None:
    """Prints every table's cells with their cost and their runs' commands, then the blocked ones, then the totals."""
    runs, missing = plan.runs, set(plan.missing)
    costs = {folder: run_flops(cfg) for folder, cfg in {run.path.parent: run.cfg for run in runs}.items()}

    def cost(runs: Iterable[Run]) -> str:
        return total(costs[run.path.parent] for run in runs)  # seeds cost the same

    blocked: dict[tuple[str, str], list[str]] = defaultdict(list)
    for spec, cell in plan.blocked:
        blocked[spec.name, cell.blocked].append(_text(cell.key))
    for table, samples in plan.tables().items():
        console.print(Text(f"{table} ({samples[0].profile.name})", "bold"))
        cells: dict[str, list[Run]] = defaultdict(list)
        for sample in samples:
            cells[_text(sample.key)].append(sample.run)
        for key, members in cells.items():
            console.print(Text(f"  {key}: {cost(members)}"))
            for run in members:
                console.print(Text(f"    {run.command}{'' if run in missing else '  [done]'}", "dim"))
    for (table, reason), keys in blocked.items():
        console.print(Text(f"blocked  {table}, {len(keys)} cells ({', '.join(keys)}): {reason}", "yellow"))
    for table, samples in plan.tables().items():
        wider, final = _search(samples, plan)
        then = f"each chosen rate is then run with the remaining seeds, {cost(final)}; " if final else ""
        if wider:
            console.print(
                f"{table}: a search: {then}each widening of the rates takes {cost(wider)}, at most {ROUNDS} times"
            )
    counts = f"{len(runs)} runs ({len(runs) - len(missing)} done) for {len(plan.samples)} samples of cells"
    console.print(f"{counts}, {len(plan.blocked)} cells blocked; to do: {cost(missing)}")


def _text(key: dict) -> str:
    return " ".join(f"{axis}={value}" for axis, value in key.items())


def _search(samples: list[Sample], plan: Plan) -> tuple[list[Run], list[Run]]:
    """As many runs as follow on the trials of a search, if there is one: each time that rates are added, and in the
    end. Which ones depends on the results."""
    wider, final, seeds = [], [], len(plan.seeds(samples[0].profile))
    for sample in {str(sample.key): sample for sample in samples if sample.point}.values():
        tried = min(seeds, of_cell(sample.profile.trial_seeds, sample.key) or seeds)
        wider += [sample.run] * tried
        final += [sample.run] * (seeds - tried)
    return wider, final
