"""A run of tests ends with the name of the test that did not: after a dead worker, after a hang that no signal ends."""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.extended

ENDS = {
    "a worker is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "a hang": "time.sleep(1000)",
    "a hang where Python sees no signal": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
}


def run_tests(folder, body: str, *limits: str) -> subprocess.CompletedProcess:
    """Runs ten tests by the settings of this repository: test_all[0] ... [9], whose argument is ``i``."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests").mkdir()
    (folder / "tests/test_it.py").write_text(
        "import hashlib, os, pytest, signal, time\n"
        f"@pytest.mark.parametrize('i', range(10))\ndef test_all(i):\n    {body}\n"
    )
    command = [sys.executable, "-m", "pytest", "-n", "2", *limits]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("what", ENDS.values(), ids=ENDS)
def test_a_run_ends_with_the_name_of_the_test(what, tmp_path):
    limits = ["--timeout=2", "-o", "faulthandler_timeout=5", "-o", "faulthandler_exit_on_timeout=true"]
    done = run_tests(tmp_path, f"if i == 7: {what}", *limits)
    assert done.returncode == 1
    assert "FAILED tests/test_it.py::test_all[7]" in done.stdout


def test_a_run_that_lasts_too_long_ends(tmp_path):
    assert run_tests(tmp_path, "time.sleep(5)", "--session-timeout=1").returncode == 2
