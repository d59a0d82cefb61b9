"""Figures are the same bytes whatever matplotlib's user set up, and are there whole or not at all."""

import os
import signal
import subprocess
import sys

import pytest

DRAW = """
import sys
from pathlib import Path
import numpy as np
from koala.tables.plots import Figure, Line, plot
x = np.arange(3.0)
line = Line("SGD", {"color": "#0072B2", "marker": "o"}, x, x + 1, x + np.nan, x + np.nan)
plot(Figure("f", "Title", "", {"digits": [line]}, "epoch", "error"), "digits", Path(sys.argv[1]))
"""
ENVIRONMENTS = {
    "a notebook's backend": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    "a backend that needs a display": {"MPLBACKEND": "TkAgg", "DISPLAY": ""},
    "a backend that is none": {"MPLBACKEND": "nonsense"},
    "no home": {"HOME": "/proc/nowhere", "MPLCONFIGDIR": "/proc/nowhere"},
    "a file of settings": {"MPLCONFIGDIR": "settings"},
}


def draw(folder, name: str, script: str = DRAW, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, str(folder / name)]
    clean = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    paths = {"PYTHONPATH": os.getcwd()}
    return subprocess.run(command, cwd=folder, env=clean | paths | environment, capture_output=True, text=True)


@pytest.mark.extended
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_figures_do_not_depend_on_the_users_matplotlib(tmp_path, suffix):
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/matplotlibrc").write_text(
        "text.usetex: True\nfont.family: Times New Roman\nsavefig.dpi: 600\n"
    )
    assert draw(tmp_path, f"plain{suffix}", MPLCONFIGDIR=str(tmp_path / "none")).returncode == 0
    for at, (name, environment) in enumerate(ENVIRONMENTS.items()):
        done = draw(tmp_path, f"{at}{suffix}", **environment)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert (tmp_path / f"{at}{suffix}").read_bytes() == (tmp_path / f"plain{suffix}").read_bytes(), name


@pytest.mark.extended
def test_a_figure_whose_drawing_is_killed_leaves_the_one_before(tmp_path):
    (tmp_path / "figure.svg").write_text("the one before")
    kill = "import matplotlib.backends.backend_svg as svg, os\n"
    kill += "svg.RendererSVG.finalize = lambda *_: os.kill(os.getpid(), 9)\n"
    assert draw(tmp_path, "figure.svg", kill + DRAW).returncode == -signal.SIGKILL
    assert (tmp_path / "figure.svg").read_text() == "the one before"
