"""What a command would do: runs, commands, blocked cells and cost."""

from collections import defaultdict

from rich.console import Console
from rich.text import Text

from koala.reproduce.cost import run_flops, total
from koala.reproduce.plan import Plan, Sample
from koala.reproduce.search import ROUNDS
from koala.tables.experiment import Experiment


def show_plan(plan: Plan, console: Console) -> None:
    """Prints every table's cells with their cost and their runs' commands, then the blocked ones, then the totals."""
    runs = plan.runs
    of_seeds = {run.path.parent: run.cfg for run in runs}
    costs = {folder: run_flops(cfg) for folder, cfg in of_seeds.items()}  # seeds cost the same
    cost = lambda runs: total(costs[run.path.parent] for run in runs)  # noqa: E731
    done = {run.path for run in runs if run.record() is not None}
    for table, samples in plan.tables().items():
        console.print(Text(f"{table} ({samples[0].profile.name})", "bold"))
        cells: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            cells[_text(sample.key)].append(sample)
        for key, members in cells.items():
            console.print(Text(f"  {key}: {cost([sample.run for sample in members])}"))
            for run in (sample.run for sample in members):
                console.print(Text(f"    {run.command}{'  [done]' if run.path in done else ''}", "dim"))
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for spec, cell in plan.blocked:
        reasons[spec.name, cell.blocked].append(_text(cell.key))
    for (table, reason), keys in reasons.items():
        console.print(Text(f"blocked  {table}, {len(keys)} cells ({', '.join(keys)}): {reason}", "yellow"))
    for table, samples in plan.tables().items():
        _show_search(table, samples, plan, cost, console)
    _show_papers(plan, console)
    missing = [run for run in runs if run.path not in done]
    console.print(
        f"{len(runs)} runs ({len(done)} done) for {len(plan.samples)} samples of cells, {len(plan.blocked)} cells "
        f"blocked; to do: {cost(missing)}"
    )


def _text(key: dict) -> str:
    return " ".join(f"{axis}={value}" for axis, value in key.items())


def _show_papers(plan: Plan, console: Console) -> None:
    """Tables, figures and cells of each paper."""
    specs = {sample.spec.name: sample.spec for sample in plan.samples} | {spec.name: spec for spec, _ in plan.blocked}
    papers: dict[str, list[Experiment]] = defaultdict(list)
    for spec in specs.values():
        papers[spec.published[0] if spec.published else "our own"].append(spec)
    for paper, members in papers.items():
        names = {spec.name for spec in members}
        runnable = {(sample.spec.name, str(sample.key)) for sample in plan.samples if sample.spec.name in names}
        blocked = sum(spec.name in names for spec, _ in plan.blocked)
        figures = sum(len(spec.figures) for spec in members)
        console.print(
            f"{paper}: {len(members)} tables with {figures} figures, {len(runnable)} cells runnable, {blocked} blocked"
        )


def _show_search(table: str, samples: list[Sample], plan: Plan, cost, console: Console) -> None:
    """How many runs follow on the trials of a search: which ones depends on their results."""
    profile = samples[0].profile
    first = {str(sample.key): sample for sample in samples if sample.point}
    if not first:
        return
    wider, final = [], []
    for sample in first.values():
        tried = len(plan.seeds(profile)[: profile.trials(sample.key)])
        wider += [sample.run] * tried
        final += [sample.run] * (len(plan.seeds(profile)) - tried)
    then = f"each chosen rate is then run with the remaining seeds, {cost(final)}; " if final else ""
    console.print(f"{table}: a search: {then}each widening of the rates takes {cost(wider)}, at most {ROUNDS} times")
