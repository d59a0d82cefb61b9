"""The committed results: every rendered table is what the committed records give; no machine's paths are in them."""

import re

import pytest

from koala.tables.load import find_specs
from koala.tables.measured import measured_path
from koala.tables.publish import EXPERIMENTS, ROOT, load_tables
from koala.tables.render import as_csv

RESULTS = ROOT / "results"


@pytest.mark.parametrize("name", find_specs(EXPERIMENTS))
def test_rendered_table_is_up_to_date(name):
    committed = RESULTS / "tables" / name
    page = committed.with_name(committed.name + ".md").read_text()
    code = re.search(r"at code (.*); do not edit", page)[1]  # what was present then; tables.py --check asks for today
    [table] = load_tables([name], RESULTS / "measured", code=code)
    assert committed.with_name(committed.name + ".csv").read_text() == as_csv(table), f"run: scripts/tables.py {name}"


@pytest.mark.parametrize("name", find_specs(EXPERIMENTS))
def test_records_have_no_absolute_paths(name):
    path = measured_path(RESULTS / "measured", name)
    if path.exists():
        assert not any(f'"{root}/' in path.read_text() for root in ("/work", "/home", "/root", "/Users"))
