"""scripts/tables.py from outside."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from koala.tables import cli, publish
from koala.tables.cli import main
from koala.tables.measured import collect
from tests.tables.synthetic import SPEC, configuration, make_row, make_spec, segment
from tests.wandb_offline import read_offline_run


def test_renders_from_records_alone(run_door, tmp_path):
    cell = {"batch_size": 128}
    told = {"table": "koala/table4", "config": configuration("koala/table4", cell)}
    rows = [make_row(cell, seed, 23.0 + seed, epochs=100.0) | told for seed in (1, 2, 3)]
    collect(tmp_path / "measured", rows)
    done = run_door("scripts/tables.py", "koala/table4", "koala/table8", "--measured", str(tmp_path / "measured"),
                    "--output", str(tmp_path / "out"), "--print")  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out/tables/koala/table4.md").read_text()
    assert "25.00 [22.52, 27.48] (3)" in text and "paper 23.39 (+1.61, 2.8σ)" in text
    assert "25.00 [22.52, 27.48] (3)" in done.stdout
    assert "not run" in (tmp_path / "out/tables/koala/table8.md").read_text()
    assert (tmp_path / "out/tables/index.html").exists()
    assert (tmp_path / "out/figures/koala/table4-curves.svg").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["koala/table99"], "koala/table99"),
        (["--profile", "none"], "'none'"),
        (["--format", "word"], "--format word"),
        (["--measured", "nowhere"], "--measured nowhere: is not a folder"),
        (["--measured", "nowhere", "--check"], "--measured nowhere: is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, said, tmp_path):
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert said in message and len(message.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_that_is_no_folder_is_one_line(capsys, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    assert main(["koala/table4", "--measured", str(tmp_path), "--output", str(tmp_path / "file" / below)]) == 2
    message = capsys.readouterr().err
    assert f"--output {tmp_path / 'file' / below}: cannot be written" in message and len(message.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A root of one experiment file, whose results and README the command may write."""
    make_spec(tmp_path, SPEC.replace("published: [paper, table1]\n", ""))
    (tmp_path / "results/measured").mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- results: small -->\nas it was\n<!-- /results -->\n")
    monkeypatch.setattr(publish, "EXPERIMENTS", tmp_path / "experiments")
    for name, path in (("ROOT", "."), ("RESULTS", "results"), ("MEASURED", "results/measured")):
        monkeypatch.setattr(cli, name, tmp_path / path)
    return tmp_path


@pytest.mark.parametrize("chosen", [["small"], ["--profile", "smoke"], ["--measured", "OTHER"]])
def test_what_is_of_everything_is_written_from_everything_alone(repository, capsys, chosen):
    assert main(["--write", "--format", "csv,html"]) == 0
    shared = [repository / name for name in ("README.md", "results/README.md", "results/tables/index.html")]
    before = [path.read_text() for path in shared]
    assert "as it was" not in before[0]
    for path in shared:
        path.write_text("of everything")
    (repository / "other").mkdir()
    chosen = [str(repository / "other") if word == "OTHER" else word for word in chosen]
    assert main([*chosen, "--format", "csv,html"]) == 0
    assert [path.read_text() for path in shared] == ["of everything"] * 3
    assert (repository / "results/tables/small.csv").exists()
    assert main([*chosen, "--format", "html"]) == 2 and "is of all tables" in capsys.readouterr().err
    assert main([*chosen, "--write"]) == 2 and "--write" in capsys.readouterr().err


def test_the_readme_is_written_when_asked_alone(repository, capsys):
    readme = repository / "README.md"
    before = readme.read_text()
    assert main(["--format", "csv"]) == 0
    assert readme.read_text() == before and "-as it was" in capsys.readouterr().out.splitlines()
    assert main(["--write", "--format", "csv"]) == 0
    assert "as it was" not in readme.read_text()
    capsys.readouterr()
    assert main(["--format", "csv"]) == 0
    assert "as it was" not in capsys.readouterr().out  # nothing would change


def test_check_of_nothing_does_not_call_it_current(capsys, tmp_path):
    assert main(["koala/table4", "--check", "--measured", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "nothing is measured\n"


@pytest.mark.extended
def test_wandb_run_reads_back_with_the_cells(run_door, tmp_path):
    told = {"table": "koala/table4", "config": configuration("koala/table4", {"batch_size": 128})}
    rows = [make_row({"batch_size": 128}, 1, 24.0, epochs=100.0) | told]
    collect(tmp_path / "measured", rows)
    done = run_door("scripts/tables.py", "koala/table4", "--measured", str(tmp_path / "measured"), "--output",
                    str(tmp_path / "out"), "--format", "csv", "--wandb", env={"WANDB_DIR": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = read_offline_run(tmp_path)
    assert any("figures/koala/table4-curves/path" in row for row in run.history)
    [path] = [row["tables/koala/table4/path"] for row in run.history if "tables/koala/table4/path" in row]
    table = json.loads((run.files / path).read_text())
    row = next(dict(zip(table["columns"], row, strict=True)) for row in table["data"] if row[0] == "128")
    assert (row["metric"], row["value"], row["n"], row["published"]) == ("top1", 24.0, 1, 23.39)
    shown = subprocess.run([Path(sys.executable).with_name("wandb"), "leet", "inspect", "--summary", run.files.parent],
                           capture_output=True, text=True)  # fmt: skip
    assert "tables/koala/table4" in shown.stdout and "finished" in shown.stdout, shown.stderr


def test_check_lists_what_is_older_and_how_to_measure_it_again(capsys, tmp_path):
    told = {size: {"table": "koala/table4", "config": configuration("koala/table4", {"batch_size": size})}
            for size in (64, 128)}  # fmt: skip
    old = segment(numerics=7)
    rows = [make_row({"batch_size": 128}, seed, epochs=100.0) | told[128] for seed in (1, 2)]
    collect(tmp_path, rows)
    assert main(["koala/table4", "--check", "--measured", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "all measured cells are of numerics" in capsys.readouterr().out
    collect(tmp_path, [make_row({"batch_size": 64}, 1, epochs=100.0, segments=[old]) | told[64]])
    assert main(["koala/table4", "--check", "--measured", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "koala/table4: 1 of 2 measured cells" in said and "64: computed by numerics 7, others by numerics" in said
    assert "python scripts/reproduce.py koala/table4 --data-path cifar100=DIR --again --collect" in said
    assert not (tmp_path / "out").exists()


def test_times_of_another_profile_are_shown_and_checked_with_their_table(capsys, tmp_path):
    cell = {"task": "digits", "optim": "sgd"}
    told = configuration("board", cell, "cpu-times")
    rows = [make_row(cell, seed, profile="cpu-times", config=told, segments=[segment(numerics=7)],
                     timing={"command": "c", "jobs": 1}) | {"table": "board"} for seed in (1, 2)]  # fmt: skip
    collect(tmp_path / "measured", rows)
    assert main(["board", "--check", "--measured", str(tmp_path / "measured")]) == 1
    said = capsys.readouterr().out
    assert "board: 1 of 1 measured cells" in said and "reproduce.py board --profile cpu-times" in said
    places = ["--measured", str(tmp_path / "measured"), "--output", str(tmp_path / "out"), "--format", "csv"]
    assert main(["board", *places]) == 0
    with open(tmp_path / "out/tables/board.csv") as file:
        found = {(row["task"], row["optim"], row["metric"]): row for row in csv.DictReader(file)}
    assert found["digits", "sgd", "step"]["value"] == "1.0" and "cpu-times" in found["digits", "sgd", "step"]["marks"]
    assert found["digits", "sgd", "step"]["versions"].startswith("numerics 7, torch")
    assert found["digits", "sgd", "steps"]["status"] == "not run" and not found["digits", "sgd", "steps"]["versions"]
