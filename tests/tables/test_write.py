"""What is written: Markdown, LaTeX, CSV, figures; and that text from files stays text."""

import csv
import io

import numpy as np
import pytest

from koala.tables.figures import curve
from koala.tables.text import markdown, sources
from koala.tables.write import as_csv, escape_latex, latex
from tests.tables.synthetic import KOALA, SGD, SPEC, TUNED, make_row, make_table, segment


@pytest.fixture
def table(tmp_path):
    """KOALA-M is significantly better than SGD, and has marks."""
    rows = [make_row(SGD, seed, error) for seed, error in ((1, 5.0), (2, 6.0), (3, 7.0))]
    koala = [(1, 3.4), (2, 4.5), (3, 5.6)]
    return make_table(tmp_path, rows + [make_row(KOALA, *run, precision="bf16", epochs=4.0) for run in koala])


def test_markdown(table):
    lines = markdown(table, {}, []).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("|")}
    assert r"6.00 \[3.52, 8.48\] (3)<br>paper 5.00 ± 0.50 (+1.00, within)" in rows["SGD"]
    assert r"**4.50 \[1.77, 7.23\] (3)** <sup>a b</sup><br>paper **4.00 (+0.50, within)**" in rows["KOALA-M"]
    assert "blocked" in rows["Magic"] and "not run" in rows["SGD"]
    legend = [line for line in lines if line.startswith("- <sup>")]
    assert [line[len("- <sup>a</sup> ") :] for line in legend] == [
        "4 epochs (paper: 10)",
        "bf16 (assumed: fp32)",
    ]
    assert "Blocked: nobody wrote it (Digits · Magic; Letters · Magic)" in "\n".join(lines)


def test_markdown_has_figures_before_its_notes_and_searches_folded(tmp_path):
    rows = [make_row(SGD, 1, point={"optim.lr": rate}, val_loss=1.0 / rate) for rate in (1, 2)]
    page = markdown(make_table(tmp_path, rows, TUNED), {"curves": ("error by step", {"": "curves.svg"})}, [])
    places = [page.index(words) for words in ("| Optimizer", "curves.svg", "## Notes", "<details>", "optim.lr = 2")]
    assert places == sorted(places) and page.rstrip().endswith("</details>")


def test_latex(table):
    text = latex(table)
    for said in (
        "Profile full.",
        "From the paper: seeds = 1, 2, 3; epochs = 10",
        "4 epochs (paper: 10)",
    ):
        assert said in text
    assert r"\toprule" in text and r"\bottomrule" in text and text.count(r"\begin") == text.count(r"\end")
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line]
    columns = text.split(r"\begin{tabular}{")[1].split("}")[0]
    assert columns == "lrrr"  # optimizer; digits: ours and paper; letters: ours alone, as nothing is printed
    assert all(line.count("&") == 3 and line.endswith(r"\\") for line in rows)
    assert r"\textbf{4.50 [1.77, 7.23] (3)}\textsuperscript{a,b} & \textbf{4.00 (+0.50, within)}" in rows[1]
    assert r"6.00 [3.52, 8.48] (3) & 5.00 $\pm$ 0.50 (+1.00, within)" in rows[0]


def test_latex_says_what_is_assumed(tmp_path):
    rows = [make_row(SGD, seed, 5.0 + seed) for seed in (1, 2)]
    text = latex(make_table(tmp_path, rows, SPEC.replace("keys: [epochs, seeds]", "keys: [epochs]")))
    assert r"\textsuperscript{\dag{},a}" in text and r"\textsuperscript{a} n = 2 (assumed: 3)" in text
    assert r"\dag{} Assumed by us: seeds = 1, 2, 3." in text and "From the paper: epochs = 10." in text


def test_a_table_of_our_own_says_whose_settings_it_takes_and_marks_no_cell(tmp_path):
    own = SPEC.replace("published: [paper, table1]\n", "").replace("keys: [epochs, seeds]", "keys: [epochs]")
    found = make_table(tmp_path, [make_row(SGD, seed) for seed in (1, 2, 3)], own)
    assert sources(found) == ["From the paper: epochs = 10.", "Our own: seeds = 1, 2, 3."]
    assert found.entry(SGD).numbers["error"].marks == ()
    own = own.replace("{label: SGD}", "{label: SGD, overrides: [optim=sgd, optim.lr=1]}").replace(
        "{label: KOALA-M}", "{label: KOALA-M, overrides: [optim=koala-m, optim.lr=2]}")  # fmt: skip
    assert sources(make_table(tmp_path, [], own))[1] == "Our own: seeds = 1, 2, 3; optim.lr = 1 | 2."


def test_latex_escapes():
    assert escape_latex("p < 0.05 | x > 1") == "p $<$ 0.05 $|$ x $>$ 1"
    assert escape_latex("50% of $x_1 & #2 {~^}\\") == (
        r"50\% of \$x\_1 \& \#2 \{\textasciitilde{}\textasciicircum{}\}\textbackslash{}"
    )


def test_csv_reads_back_unrounded(table):
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert len(rows) == 6
    sgd = rows[0]
    numbers = [float(sgd[field]) for field in ("value", "std", "n", "finite")]
    assert (sgd["data"], sgd["optim"], sgd["statistic"], numbers) == ("digits", "sgd", "mean", [6.0, 1.0, 3.0, 3.0])
    assert float(sgd["difference"]) == 1.0 and sgd["configs"] == "0123456789ab"
    assert rows[2]["status"] == "blocked" and rows[2]["value"] == ""


def test_csv_has_every_commit_of_a_run(tmp_path):
    parts = [segment(git={"commit": letter * 40, "dirty": False}) for letter in "ab"]
    [row, *_] = csv.DictReader(io.StringIO(as_csv(make_table(tmp_path, [make_row(SGD, segments=parts)]))))
    assert row["commits"] == f"{'a' * 10} {'b' * 10}"


EVIL = "<script>alert('&')</script>"


def test_markdown_keeps_markup_from_files_as_text(tmp_path):
    text = SPEC.replace("label: SGD", f'label: "{EVIL}|x"')
    found = markdown(make_table(tmp_path, [make_row(SGD, 1, command="a|b\n<img>")], text), {}, [])
    assert "<script>" not in found and "<img>" not in found and "\\|x" in found
    grid = [line for line in found.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in grid[:5]}) == 1  # no column was broken


def test_csv_is_no_formula(tmp_path):
    text = SPEC.replace("sgd: {label", '"=1+1": {overrides: [], label')
    found = as_csv(make_table(tmp_path, [], text))
    assert "digits,'=1+1,error" in found


def test_curve_is_mean_and_interval_over_seeds():
    runs = [
        {"history": [{"epoch": 1, "e": 2.0}, {"epoch": 2, "e": 1.0}]},
        {"history": [{"epoch": 1, "e": 4.0}, {"epoch": 2}, {"epoch": 3.5, "e": 3.0}]},
        {"history": [{"epoch": 1, "e": 3.0}, {"epoch": 2, "e": 2.0}, {"epoch": 3, "e": 1.0}]},
    ]
    found = curve(runs, "e", "epoch")
    assert list(found["x"]) == [1.0, 2.5] and list(found["y"]) == [3.0, 2.0]
    half = 4.302653 / 3**0.5  # t of two degrees of freedom, times s / sqrt(n) = 1 / sqrt(3)
    assert found["low"] == pytest.approx([3 - half, 2 - half], rel=1e-4)
    assert found["high"] == pytest.approx([3 + half, 2 + half], rel=1e-4)
    assert np.isnan(curve(runs[:2], "e", "epoch")["low"]).all()  # two runs are no interval
    assert curve([{"history": [{"epoch": 1}]}], "e", "epoch") is None
