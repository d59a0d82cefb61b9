"""Figures: colours that everybody can tell apart, and what the lines of a search say."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas

from koala.tables.figures import figures, histories, sensitivity
from koala.tables.plots import COLORS, OTHERS, Figure, Line, plot, style
from koala.tables.published import load_published
from koala.tables.table import BUSY, build
from tests.tables.synthetic import KOALA, SGD, SPEC, TUNED, make_experiment, make_row, make_table, segment

THREE = TUNED.replace("[1, 2]", "[1, 2, 3]")
# Machado, Oliveira, Fernandes 2009, severity 1: what an eye without one kind of cone makes of linear RGB.
EYES = {
    "normal": np.eye(3),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(color: str, eye: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as #RRGGBB."""
    rgb = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(eye @ linear, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", EYES)
def test_any_two_colours_can_be_told_apart(eye):
    colors = [*COLORS.values(), *OTHERS]
    for one, other in itertools.combinations(colors, 2):
        assert np.linalg.norm(lab(one, EYES[eye]) - lab(other, EYES[eye])) >= 10.9, (one, other)


def test_every_optimizer_has_a_colour_of_its_own(root):
    names = {path.stem for path in (root / "configs/optim").glob("*.yaml")}
    assert names == set(COLORS), "every optimizer, and nothing else, has a colour in koala/tables/plots.py"
    assert len(set(COLORS.values())) == len(COLORS) and style("nobody's")["color"] in OTHERS


def searched(tmp_path):
    """SGD has validation loss 0.3, 0.1, 0.2 and test error 6, 5, 4 at its three rates; KOALA-M's last rate diverges."""
    rows = [make_row(SGD, seed, error + seed, val_loss=loss, point={"optim.lr": rate})
            for rate, loss, error in ((1, 0.3, 6), (2, 0.1, 5), (3, 0.2, 4)) for seed in (-0.5, 0.5)]  # fmt: skip
    rows += [make_row(KOALA, seed, 3.0, point={"optim.lr": rate}, val_loss=0.5,
                      status="diverged" if rate == 3 else "finished")
             for rate in (1, 2, 3) for seed in (1, 2)]  # fmt: skip
    return make_table(tmp_path, rows, THREE)


def test_sensitivity_shows_every_rate_and_rings_the_chosen_one(tmp_path):
    sgd, koala = sensitivity(searched(tmp_path))["Digits"]
    assert list(sgd.x) == [1, 2, 3] and list(sgd.y) == pytest.approx([0.3, 0.1, 0.2]) and sgd.ring == (2, 0.1)
    assert list(koala.x) == [1, 2]  # no point where a run diverged


def test_a_run_that_diverged_before_its_first_evaluation_is_not_left_out_of_the_mean(tmp_path):
    at_once = make_row(SGD, 3, status="diverged") | {"history": []}
    table = make_table(tmp_path, [make_row(SGD, 1), make_row(SGD, 2), at_once, make_row(KOALA, 1)])
    assert [line.label for line in histories(table, lambda entry: "test_top1_error", "epoch")["Digits"]] == ["KOALA-M"]


def test_time_is_drawn_only_of_runs_one_at_a_time(tmp_path):
    in_turn = SPEC + "timed: true\n"

    def names(text=in_turn, **fields):
        table = make_table(tmp_path, [make_row(SGD, 1, **fields), make_row(KOALA, 1, **fields)], text)
        return [figure.name for figure in figures(table)]

    alone = {"command": "c", "jobs": 1}
    assert names() == ["curves"]
    assert names(timing=alone) == ["curves", "time"] and names(timing=alone | {"jobs": 2}) == ["curves"]
    assert names(SPEC, timing=alone) == ["curves"]  # one at a time, all of one optimizer and then the next
    by = [make_row(cell, 1, timing={"command": command, "jobs": 1}) for cell, command in ((SGD, "c"), (KOALA, "d"))]
    assert [figure.name for figure in figures(make_table(tmp_path, by, in_turn))] == ["curves"]
    busy = [make_row(SGD, 1, timing={"command": "c", "jobs": 1}, segments=[segment(load=[1.2, 3.0])])]
    idle, loaded = (figures(make_table(tmp_path, rows, in_turn))[1].caption for rows in (by[:1], busy))
    assert BUSY in loaded and BUSY not in idle


def test_each_panel_has_the_label_of_its_curves(tmp_path):
    text = SPEC.replace("key: test_top1_error", "key: {data: {digits: test_top1_error, letters: test_ppl}}")
    history = [{"epoch": float(e), "step": e, "seconds": float(e), "test_ppl": 9.0 - e} for e in (1, 2)]
    rows = [make_row(SGD, 1), make_row({"data": "letters", "optim": "sgd"}, 1, history=history)]
    figure = figures(make_table(tmp_path, rows, text))[0]
    assert list(figure.panels) == list(figure.ylabel) == ["Digits", "Letters"]
    assert list(figure.ylabel.values()) == ["test top-1 error (%)", "test perplexity"]
    assert "test perplexity or test top-1 error (%) by step" in figure.caption


def test_numbers_below_an_axis_do_not_overlap(tmp_path, monkeypatch):
    """Rates of many optimizers in one panel: eight decades."""
    drawn, savefig = [], Canvas.savefig
    monkeypatch.setattr(
        Canvas, "savefig", lambda self, *args, **kept: drawn.append(self) or savefig(self, *args, **kept)
    )
    rates = np.array([1e-4, 4e3])
    line = Line("SGD", style("sgd"), rates, rates, rates, rates)
    panels = {"LSTM": [line], "GPT": [line]}
    plot(Figure("rates", "Rates", "", panels, "lr", "loss", log_x=True), "LSTM", tmp_path / "rates.svg")
    drawn[0].draw_without_rendering()  # an SVG has another resolution
    for axis in drawn[0].axes:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        shown = [tick.label1.get_window_extent() for tick in ticks]
        assert len(shown) >= 3 and all(one.x1 + 5 < other.x0 for one, other in itertools.pairwise(shown))


PRINTED = """
figures:
  own: {title: Theirs and ours, kind: curve, y: test_top1_error, published: [paper, figure1]}
  by-rate: {title: By rate, kind: sensitivity, x: optim, y: error, log: true}
"""


def test_a_files_own_figures_carry_the_papers_points(tmp_path):
    (tmp_path / "published").mkdir()
    (tmp_path / "published/paper.yaml").write_text("""
paper: paper
citation: Somebody
figures:
  figure1: {points: [{optim: sgd, metric: val_top1_error, x: epoch, at: 5, value: 7.0, plus_minus: 0.1}]}
""")
    text = SPEC.replace("sgd: {label: SGD}", "1: {label: one, overrides: [optim=sgd], published: {optim: sgd}}")
    text = (
        text.replace("published: [paper, table1]\n", "")
        .replace("koala-m: {label", "2: {label")
        .replace("magic: {label", "3: {label")
        .replace("magic}", "3}")
    )
    spec = make_experiment(tmp_path, text + PRINTED)
    published = load_published(tmp_path / "published", spec)
    rows = [make_row({"data": "digits", "optim": optim}, 1) for optim in (1, 2)]
    table = build(spec, spec.profile("full"), rows[:1], published)
    found = {figure.name: figure.panels for figure in figures(table)}
    assert found["own"]["Digits"][0].printed == [(5.0, 7.0, 0.1)]
    [line] = found["by-rate"][""]
    assert (list(line.x), list(line.y), line.label) == ([1.0], [4.0], "Digits")
