"""Any finished runs become a table; a stranger's records stay text."""

import csv

import pytest

from koala import records
from koala.tables.cli import main
from tests.tables.synthetic import make_row

ESCAPE = "\x1b[2J\x1b]0;owned\x07<script>"
RECORDED = ("table", "profile", "cell", "point", "history")


def leave(folder, optim: str, seed: int, reached: float = 4.0, *, data="digits", lr=0.1, **fields) -> None:
    """A finished run of a sweep, as train.py leaves it."""
    config = {"data": {"name": data}, "optim": {"name": optim, "lr": lr}, "select": "last", "seed": seed,
              "output_root": f"out{seed}"}  # fmt: skip
    row = make_row({}, seed, reached, name=f"{data}/mlp/{optim}", config=config, config_hash=f"{optim}{lr}{data}")
    row |= fields
    path = folder / data / optim / str(lr) / f"seed{seed}"
    records.write_json(path / records.RECORD, {key: row[key] for key in row if key not in RECORDED})
    records.write_rows(path / records.METRICS, row["history"])


def render(folder, out) -> dict[tuple[str, str], dict]:
    assert main(["--runs", str(folder), "--output", str(out)]) == 0
    [path] = (out / "tables").glob("runs-*.csv")
    rows = csv.DictReader(path.open())
    return {(row["task"], row["run"]): row for row in rows if row["metric"] == "metric"}


def test_sweep_is_grouped_by_optimizer_and_what_was_swept(tmp_path, capsys):
    for seed in (1, 2, 3):
        leave(tmp_path / "outputs", "sgd", seed, 5.0 + seed)
        leave(tmp_path / "outputs", "koala-m", seed, 4.0 + seed, lr=1.0)
        leave(tmp_path / "outputs", "koala-m", seed, (3.99, 5.0, 6.01)[seed - 1], lr=2.0)
    leave(tmp_path / "outputs", "sgd", 1, 9.0, data="letters")
    leave(tmp_path / "outputs", "sgd", 4, status="failed", error="out of memory")
    found = render(tmp_path / "outputs", tmp_path / "out")
    assert {key: (float(row["value"]), int(row["n"]), row["best"]) for key, row in found.items()} == {
        ("digits/mlp", "sgd"): (7.0, 3, "False"),
        ("digits/mlp", "koala-m optim.lr=1.0"): (6.0, 3, "False"),
        ("digits/mlp", "koala-m optim.lr=2.0"): (5.0, 3, "True"),
        ("letters/mlp", "sgd"): (9.0, 1, "False"),
    }
    assert "koala-m" in capsys.readouterr().out
    assert len(list((tmp_path / "out/figures").glob("runs-*-curves-*.svg"))) == 2  # a file a panel


@pytest.mark.parametrize("first, second", [("adam", "sgd"), ("sgd", "adam")])
def test_a_run_that_diverged_does_not_decide_the_metric_of_its_task(tmp_path, capsys, first, second):
    """A run of select=best-val is tested when it is through; one that diverged has validation alone."""
    tested = {"final": {"test_ppl": 90.0, "val_ppl": 80.0, "val_loss": 4.4}, "best": {}}
    lost = {"final": {"val_ppl": 900.0, "val_loss": 6.8}, "best": {}}
    leave(tmp_path / "outputs", first, 1, data="ptb", status="diverged", error="loss is nan", metrics=lost)
    leave(tmp_path / "outputs", second, 1, data="ptb", metrics=tested)
    leave(tmp_path / "outputs", "sgd", 1, data="digits")
    leave(tmp_path / "outputs", "sgd", 1, data="letters", status="diverged", metrics={"final": {}, "best": {}})
    found = render(tmp_path / "outputs", tmp_path / "out")
    assert found["ptb/mlp", second]["value"] == "90.0" and found["ptb/mlp", first]["status"] == "diverged"
    assert found["digits/mlp", "sgd"]["value"] == "4.0" and found["letters/mlp", "sgd"]["status"] == "diverged"
    [page] = (tmp_path / "out/tables").glob("runs-*.md")
    for head in ("digits/mlp · Test top-1 error (%)", "ptb/mlp · Test perplexity", "ptb/mlp · Validation loss"):
        assert head in page.read_text()


def test_configurations_that_only_their_hash_tells_apart_are_two_rows(tmp_path):
    """The same folder of data with other content: every key is the same."""
    leave(tmp_path / "before", "sgd", 1, 4.0, config_hash="aaaaaaaaaaaa")
    leave(tmp_path / "after", "sgd", 1, 6.0, config_hash="bbbbbbbbbbbb")
    assert main(["--runs", str(tmp_path / "before"), str(tmp_path / "after"), "--output", str(tmp_path / "out")]) == 0
    [path] = (tmp_path / "out/tables").glob("runs-*.csv")
    rows = [row for row in csv.DictReader(path.open()) if row["metric"] == "metric"]
    assert {row["run"]: row["value"] for row in rows} == {"sgd aaaaaaaaaaaa": "4.0", "sgd bbbbbbbbbbbb": "6.0"}


def test_keys_that_change_no_number_set_no_row_apart(tmp_path):
    for seed, (rate, compiled) in enumerate([(0.1, False), (0.2, True)]):
        config = {"data": {"name": "digits"}, "optim": {"name": "sgd", "lr": rate}, "compile": compiled}
        leave(tmp_path / "outputs", "sgd", seed, lr=rate, config=config)
    found = render(tmp_path / "outputs", tmp_path / "out")
    assert {run for _, run in found} == {"sgd optim.lr=0.1", "sgd optim.lr=0.2"}


def test_runs_as_they_were_found_depart_from_nothing(tmp_path):
    """No file says which precision or how many seeds there should be."""
    for seed in (1, 2, 3):
        leave(tmp_path / "outputs", "sgd", seed, precision="bf16", epochs=7.0)
    [row] = render(tmp_path / "outputs", tmp_path / "out").values()
    assert (row["n"], row["marks"]) == ("3", "")


def test_a_run_made_again_counts_once_as_it_was_made_last(tmp_path):
    for seed in (1, 2):
        leave(tmp_path / "outputs", "sgd", seed, 9.0)
    folder = tmp_path / "outputs/digits/sgd/0.1/seed1"
    folder.rename(folder.with_name("seed1.20260101T000000"))  # as rerun=true does
    leave(tmp_path / "outputs", "sgd", 1, 5.0, finished="2026-01-03T00:00:00+00:00")
    (row,) = render(tmp_path / "outputs", tmp_path / "out").values()
    assert (float(row["value"]), int(row["n"])) == (7.0, 2)


@pytest.mark.parametrize(
    "arguments",
    [["--runs", "nowhere"], ["--runs", "."], ["--runs", ".", "--profile", "full"]],
)
def test_bad_folders_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not any(tmp_path.iterdir())


def test_terminal_escapes_of_a_strangers_record_reach_no_page(tmp_path, capsys):
    leave(tmp_path / "outputs", "sgd", 1, device=ESCAPE, command=ESCAPE)
    [path] = (tmp_path / "outputs").rglob(records.RECORD)
    text = path.read_text().replace("owned", "owned\\u009b")  # as another program might have written it
    assert "x1b" in text
    path.write_text(text.replace("\\\\x1b", "\\u001b"))
    render(tmp_path / "outputs", tmp_path / "out")
    pages = [page for page in (tmp_path / "out").rglob("*") if page.suffix in (".md", ".tex", ".csv")]
    assert len(pages) == 3
    for page in pages:
        text = page.read_text()
        assert not any(sign in text for sign in "\x1b\x07\x9b"), page
        assert "<script>" not in text or page.suffix in (".tex", ".csv")
    assert "\x1b" not in capsys.readouterr().out
