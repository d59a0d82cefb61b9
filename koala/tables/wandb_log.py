"""The tables and figures as one W&B run called `tables`."""

from pathlib import Path

from koala.tables.build import Table
from koala.tables.figures import draw
from koala.tables.render import csv_rows
from koala.training.monitor import wandb_mode

PROJECT = "koala"
NUMERIC = ("value", "low", "high", "std", "n", "finite", "published", "published_std", "difference", "sigmas")


def log_tables(tables: list[Table], folder: Path) -> Path:
    """Logs every table (long form, one row a cell and metric) and every figure; returns the run's local folder.

    Without a W&B key the run is written offline below `folder`; `wandb sync` uploads it later.
    """
    import wandb

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True)
    run = wandb.init(
        project=PROJECT, name="tables", job_type="tables", dir=str(folder), mode=wandb_mode(), settings=settings
    )
    with run:
        for table in tables:
            heads, rows = csv_rows(table)
            # W&B wants one type a column; the names of an axis's values may mix numbers and text.
            data = [
                [value if head in NUMERIC else str(value) for head, value in zip(heads, row, strict=True)]
                for row in rows
            ]
            logged = {f"tables/{table.spec.name}": wandb.Table(columns=heads, data=data)}
            for figure in draw(table, folder / "wandb" / "figures", "png"):
                logged[f"figures/{figure.name}"] = wandb.Image(str(figure.path), caption=figure.caption)
            run.log(logged)
    return Path(run.dir).parent
