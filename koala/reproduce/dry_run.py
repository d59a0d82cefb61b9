"""What a command would do: runs, commands, blocked cells and cost."""

from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from koala.reproduce.estimate import Estimate, estimate, measured_rates, paper_rate
from koala.reproduce.plan import Place, Plan
from koala.reproduce.search import ROUNDS
from koala.tables.spec import Spec


def show_plan(plan: Plan, measured: Path, console: Console) -> None:
    """Prints every table's cells with their cost and their runs' commands, then the blocked ones, then the totals."""
    rates = measured_rates(measured)
    one_of = {run.path.parent: run for run in plan.runs}  # seeds cost the same
    alike = {folder: estimate(run.cfg, rates) for folder, run in one_of.items()}
    costs = {run.path: alike[run.path.parent] for run in plan.runs}
    for table, places in plan.tables().items():
        console.print(Text(f"{table} ({places[0].profile.name})", "bold"))
        cells: dict[str, list[Place]] = defaultdict(list)
        for place in places:
            cells[" ".join(f"{axis}={value}" for axis, value in place.key.items())].append(place)
        for key, members in cells.items():
            console.print(Text(f"  {key}: {len(members)} runs, {total([costs[place.run.path] for place in members])}"))
            for place in members:
                state = "" if place.run.record() is None else "  [done]"
                console.print(Text(f"    {place.run.command}{state}", "dim"))
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for spec, cell in plan.blocked:
        reasons[spec.name, cell.blocked].append(" ".join(f"{axis}={value}" for axis, value in cell.key.items()))
    for (table, reason), keys in reasons.items():
        console.print(Text(f"blocked  {table}, {len(keys)} cells ({', '.join(keys)}): {reason}", "yellow"))
    for table, places in plan.tables().items():
        _say_what_a_search_adds(table, places, plan, costs, console)
    _say_what_there_is_of_each_paper(plan, console)
    missing = [run for run in plan.runs if run.record() is None]
    shared = len(plan.places) - len(plan.runs)
    console.print(
        f"{len(plan.runs)} runs ({len(plan.runs) - len(missing)} done; {shared} more places are filled by a run that "
        f"another cell has too), {len(plan.blocked)} cells blocked; "
        f"to do: {len(missing)} runs, {total([costs[run.path] for run in missing])}"
    )
    sources = sorted({cost.source for cost in costs.values() if cost})
    console.print(
        f"How: FLOPs are counted on each model; hours from throughput ({'; '.join(sources) or 'none'}). "
        f"The paper's GPU does {paper_rate() / 1e12:.1f} TFLOP/s, as its printed wall time implies "
        f"(KOALA, supplement, Table 3)."
    )


def _say_what_there_is_of_each_paper(plan: Plan, console: Console) -> None:
    """Tables, figures and their cells by the paper they answer to."""
    specs = {place.spec.name: place.spec for place in plan.places} | {spec.name: spec for spec, _ in plan.blocked}
    papers: dict[str, list[Spec]] = defaultdict(list)
    for spec in specs.values():
        papers[spec.published[0] if spec.published else "our own"].append(spec)
    for paper, members in papers.items():
        names = {spec.name for spec in members}
        runnable = {(place.spec.name, str(place.key)) for place in plan.places if place.spec.name in names}
        blocked = sum(spec.name in names for spec, _ in plan.blocked)
        figures = sum(len(spec.figures) for spec in members)
        console.print(
            f"{paper}: {len(members)} tables with {figures} figures, {len(runnable)} cells runnable, {blocked} blocked"
        )


def _say_what_a_search_adds(table: str, places: list[Place], plan: Plan, costs: dict, console: Console) -> None:
    """How many runs follow on the trials: they depend on what the trials say, and so are not listed."""
    profile = places[0].profile
    first = {str(place.key): place for place in places if place.point}
    if first:
        more, wider = [], []
        for place in first.values():
            tried = len(plan.seeds(profile)[: profile.trials(place.key)])
            wider += [costs[place.run.path]] * tried
            more += [costs[place.run.path]] * (len(plan.seeds(profile)) - tried)
        then = f"each chosen rate is then run with the seeds that are left, {len(more)} runs, {total(more)}; "
        console.print(
            f"{table}: a search: {then if more else ''}each widening of the rates takes {len(wider)} runs, "
            f"{total(wider)}, at most {ROUNDS} times"
        )


def total(costs: list[Estimate | None]) -> str:
    """The sum in words."""
    known = [cost for cost in costs if cost]
    flops, hours = sum(cost.flops for cost in known), sum(cost.hours for cost in known)
    unknown = f" (and {len(costs) - len(known)} runs of unknown size)" if len(known) < len(costs) else ""
    shown = f"{hours:,.0f} h" if hours >= 10 else f"{hours:.2f} h" if hours >= 0.02 else f"{hours * 3600:.0f} s"
    return f"{flops:.2e} FLOP, {shown}{unknown}"
