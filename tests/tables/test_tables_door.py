"""scripts/tables.py from outside."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from koala.tables import cli
from koala.tables.cli import main
from koala.tables.measured import collect
from tests.tables.synthetic import SPEC, make_experiment, make_row, segment
from tests.tables.test_runs import leave
from tests.wandb_offline import read_offline_run

TABLE4 = {"table": "koala/table4"}
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "hydra"):
            raise ImportError(f"rendering imports {name}")

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
from koala.tables.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_renders_from_records_alone(run_door, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    rows = [make_row({"batch_size": 128}, seed, 23.0 + seed, epochs=100.0) | TABLE4 for seed in (1, 2, 3)]
    collect(tmp_path / "measured", rows)
    done = run_door("scripts/tables.py", "koala/table4", "koala/table8", "--measured", str(tmp_path / "measured"),
                    "--output", str(tmp_path / "out"), "--print")  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out/tables/koala/table4.md").read_text()
    assert r"25.00 \[22.52, 27.48\] (3)" in text and "paper 23.39 (+1.61, 2.8σ)" in text
    assert "25.00 [22.52, 27.48] (3)" in done.stdout
    assert "not run" in (tmp_path / "out/tables/koala/table8.md").read_text()
    assert (tmp_path / "out/figures/koala/table4-curves.svg").exists()


def without_torch(root, *arguments: object, **environment: str) -> str:
    """What tables.py prints where neither torch nor Hydra can be imported."""
    command = [sys.executable, "-c", BLOCKED, str(root), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_torch_and_hydra_the_same_files_come_out(tmp_path, root):
    collect(tmp_path / "measured", [make_row({"batch_size": 128}, seed) | TABLE4 for seed in (1, 2, 3)])
    leave(tmp_path / "outputs", "sgd", 1)
    of_file = ["koala/table4", "--measured", str(tmp_path / "measured"), "--print"]
    for at, arguments in enumerate((of_file, ["--runs", str(tmp_path / "outputs")])):
        there, here = tmp_path / f"with{at}", tmp_path / f"without{at}"
        assert main([*arguments, "--output", str(there)]) == 0
        without_torch(root, *arguments, "--output", here)
        files = [path.relative_to(there) for path in there.rglob("*") if path.is_file()]
        assert len(files) == 4
        for path in files:
            assert (there / path).read_bytes() == (here / path).read_bytes(), path


@pytest.mark.parametrize(
    "arguments",
    [
        ["koala/table99"],
        ["--profile", "none"],
        ["--format", "word"],
        ["--measured", "nowhere"],
        ["koala/table4", "--write"],
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, tmp_path):
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "tables.py: " in message and len(message.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_that_is_no_folder_is_one_line(capsys, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    assert main(["koala/table4", "--measured", str(tmp_path), "--output", str(tmp_path / "file" / below)]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "file" / below) in message and len(message.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A root of one experiment file, whose results and README the command may write."""
    make_experiment(tmp_path, SPEC.replace("published: [paper, table1]\n", ""))
    collect(tmp_path / "results/measured", [make_row({"data": "digits", "optim": "sgd"}, 1)])
    (tmp_path / "README.md").write_text("<!-- results: small error -->\nas it was\n<!-- /results -->\n")
    for name, path in (("ROOT", "."), ("RESULTS", "results"), ("EXPERIMENTS", "experiments")):
        monkeypatch.setattr(cli, name, tmp_path / path)
    return tmp_path


@pytest.mark.parametrize("chosen", [["small"], ["--profile", "full"], ["--measured", "OTHER"]])
def test_pages_of_everything_are_written_from_everything_alone(repository, chosen):
    assert main(["--write", "--format", "csv"]) == 0
    shared = [repository / name for name in ("README.md", "results/README.md")]
    assert "as it was" not in shared[0].read_text()
    for path in shared:
        path.write_text("of everything")
    (repository / "other").mkdir()
    chosen = [str(repository / "other") if word == "OTHER" else word for word in chosen]
    (repository / "results/tables/small.csv").unlink()
    assert main([*chosen, "--format", "csv"]) == 0
    assert [path.read_text() for path in shared] == ["of everything"] * 2
    assert (repository / "results/tables/small.csv").exists()
    assert main([*chosen, "--write"]) == 2


def test_the_readme_is_written_when_requested_alone(repository):
    readme = repository / "README.md"
    before = readme.read_text()
    assert main(["--format", "csv"]) == 0 and readme.read_text() == before
    assert main(["--format", "csv", "--write"]) == 0 and "as it was" not in readme.read_text()


@pytest.mark.extended
def test_wandb_run_reads_back_with_the_cells(root, tmp_path):
    collect(tmp_path / "measured", [make_row({"batch_size": 128}, 1, 24.0, epochs=100.0) | TABLE4])
    without_torch(root, "koala/table4", "--measured", tmp_path / "measured", "--output", tmp_path / "out", "--format",
                  "csv", "--wandb", WANDB_DIR=str(tmp_path), WANDB_MODE="offline")  # fmt: skip
    run = read_offline_run(tmp_path)
    assert any("figures/table4-curves/path" in row for row in run.history)
    [path] = [row["tables/koala/table4/path"] for row in run.history if "tables/koala/table4/path" in row]
    table = json.loads((run.files / path).read_text())
    row = next(dict(zip(table["columns"], row, strict=True)) for row in table["data"] if row[0] == "128")
    assert (row["metric"], row["value"], row["n"], row["published"]) == ("top1", 24.0, "1", 23.39)
    shown = subprocess.run([Path(sys.executable).with_name("wandb"), "leet", "inspect", "--summary", run.files.parent],
                           capture_output=True, text=True)  # fmt: skip
    assert "tables/koala/table4" in shown.stdout and "finished" in shown.stdout, shown.stderr


def test_times_of_another_profile_are_shown_with_their_table(tmp_path):
    cell = {"task": "digits", "optim": "sgd"}
    rows = [make_row(cell, seed, profile="cpu-times", segments=[segment(numerics=7)],
                     timing={"command": "c", "jobs": 1}) | {"table": "board"} for seed in (1, 2)]  # fmt: skip
    collect(tmp_path / "measured", rows)
    places = ["--measured", str(tmp_path / "measured"), "--output", str(tmp_path / "out"), "--format", "csv"]
    assert main(["board", *places]) == 0
    with open(tmp_path / "out/tables/board.csv") as file:
        found = {(row["task"], row["optim"], row["metric"]): row for row in csv.DictReader(file)}
    assert found["digits", "sgd", "step"]["value"] == "1.0" and "cpu-times" in found["digits", "sgd", "step"]["marks"]
    assert found["digits", "sgd", "step"]["versions"].startswith("numerics 7, torch")
    assert found["digits", "sgd", "steps"]["status"] == "not run" and not found["digits", "sgd", "steps"]["versions"]
