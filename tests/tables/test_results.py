"""The committed results: every rendering is what the committed records give; no machine's paths are in them."""

import json
import re

import pytest

from koala.tables.load import find_specs
from koala.tables.measured import measured_path, read_all
from koala.tables.overview import BLOCK, fill, overview
from koala.tables.publish import EXPERIMENTS, ROOT, load_tables
from koala.tables.render import as_csv

RESULTS = ROOT / "results"
TABLES = RESULTS / "tables"
RENDERED = sorted(path.relative_to(TABLES).with_suffix("").as_posix() for path in TABLES.rglob("*.csv"))


def test_measured_tables_are_rendered_and_no_others():
    measured = [name for name in find_specs(EXPERIMENTS) if measured_path(RESULTS / "measured", name).exists()]
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
    assert len(BLOCK.findall(readme)) >= 3


def test_readmes_figures_are_rendered():
    for text, folder in ((ROOT / "README.md", ROOT), (RESULTS / "README.md", RESULTS)):
        for link in re.findall(r"!\[[^\]]*\]\(([^)#]+)\)", text.read_text()):
            assert (folder / link).exists(), link


@pytest.mark.parametrize("name", find_specs(EXPERIMENTS))
def test_records_have_no_absolute_paths(name):
    text = json.dumps(read_all(measured_path(RESULTS / "measured", name)))
    assert not re.search(r"[\"'= ]/(work|home|root|Users)/", text)
