"""The committed results: every rendering is what the committed records give; no machine's paths are in them."""

import re

import pytest

from koala.tables.cli import EXPERIMENTS, RESULTS, ROOT, load_tables
from koala.tables.experiment import find_experiments
from koala.tables.readme import BLOCK, fill, overview
from koala.tables.write import as_csv

TABLES = RESULTS / "tables"
RENDERED = sorted(path.relative_to(TABLES).with_suffix("").as_posix() for path in TABLES.rglob("*.csv"))


def test_measured_tables_are_rendered_and_no_others():
    measured = [name for name in find_experiments(EXPERIMENTS) if any((RESULTS / "measured" / name).glob("*/*.jsonl"))]
    assert sorted(measured) == RENDERED


@pytest.mark.extended
@pytest.mark.parametrize("name", RENDERED)
def test_rendered_table_is_up_to_date(name):
    [table] = load_tables([name], RESULTS / "measured")
    assert (TABLES / f"{name}.csv").read_text() == as_csv(table), f"run: scripts/tables.py {name}"


def test_overview_and_readme_are_up_to_date():
    """Both are written by `scripts/tables.py --write`, from the records that the tables are from."""
    page, readme = RESULTS / "README.md", (ROOT / "README.md").read_text()
    tables = load_tables([], RESULTS / "measured")
    assert page.read_text() == overview(tables), "run: scripts/tables.py"
    assert readme == fill(readme, tables), "run: scripts/tables.py --write"
    assert BLOCK.search(readme)


def test_readmes_figures_are_rendered():
    for text, folder in ((ROOT / "README.md", ROOT), (RESULTS / "README.md", RESULTS)):
        for link in re.findall(r"!\[[^\]]*\]\(([^)#]+)\)", text.read_text()):
            assert (folder / link).exists(), link


def test_records_are_small_files_without_absolute_paths():
    for path in (RESULTS / "measured").rglob("*.jsonl"):
        assert path.stat().st_size < 1_000_000, path
        assert not re.search(r"[\"'= ]/(work|home|root|Users)/", path.read_text()), path
