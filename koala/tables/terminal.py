"""A table in the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from koala.tables import layout
from koala.tables.build import Table
from koala.tables.standings import comparable_tasks, standings


def show(table: Table, console: Console | None = None) -> None:
    """Prints the grid, the marks and what is blocked; long tables of notes stay in the files."""
    console = console or Console()
    grid = Grid(
        title=Text(f"{table.spec.title} ({table.spec.name}, profile {table.profile.name})"), box=box.SIMPLE_HEAD
    )
    heads, letters = layout.columns(table), layout.marks(table)
    for name in table.spec.rows:
        grid.add_column(Text(table.spec.axis(name).label))
    for head in heads:
        grid.add_column(Text("\n".join((*head.heads, head.metric.label))), justify="right")
    for row in layout.rows(table):
        cells = []
        for number, head in zip(row.numbers, heads, strict=True):
            cell = Text()
            if number is not None:
                cell.append(layout.measured_text(number, head.metric), "bold green" if number.best else "")
                cell.append("".join(f" {letters[mark]}" for mark in number.marks), "dim")
                printed = layout.published_text(number, head.metric)
                cell.append(f"\npaper {printed}" if printed else "", "dim")
            cells.append(cell)
        grid.add_row(*map(Text, row.labels), *cells)
    console.print(grid)
    for mark, letter in letters.items():
        console.print(Text(f"  {letter}  {mark}", "dim"))
    for label, line in standings(comparable_tasks(table)).items():
        console.print(Text.assemble((label, "bold"), f": {line}"))
    for reason, cells in layout.absent(table):
        console.print(Text(f"  {len(cells)} cells: {reason}", "yellow"))
