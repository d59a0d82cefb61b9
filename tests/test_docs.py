"""The site builds: every link and reference has its target, every docstring its markup, every page its place."""

import subprocess
import sys

from tests.conftest import ROOT


def test_the_site_builds_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        tmp_path / "trees",
        "docs",
        tmp_path / "site",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/optimizers.html").read_text()
    for name in ("VanillaKOALA", "MomentumKOALA", "KOALAPlusPlus", "SOFIM", "SGDF"):
        assert f'id="koala.{name}"' in page
