"""What a record says of the checkout that made it."""

import subprocess

import pytest

from koala import fingerprint


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of one commit, whose package is taken for the suite's."""
    package = tmp_path / "suite" / "koala"
    package.mkdir(parents=True)
    (package / "code.py").write_text("x = 1\n")
    commit(package.parent)
    monkeypatch.setattr(fingerprint, "PACKAGE", package)
    fingerprint._warn.cache_clear()
    return package.parent


def commit(folder) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    return head(folder)


def head(folder) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_checkout_with_sources_that_git_does_not_know_is_no_clean_commit(checkout):
    (checkout / "notes.txt").write_text("of somebody's")
    assert fingerprint.git() == {"commit": head(checkout), "dirty": False}
    (checkout / "koala" / "new.py").write_text("x = 2\n")
    assert fingerprint.git()["dirty"] is True


def test_a_checkout_of_another_owner_has_its_commit(checkout, monkeypatch, capsys):
    """Root in a container: "detected dubious ownership in repository"."""
    expected = head(checkout)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")
    assert fingerprint.git() == {"commit": expected, "dirty": False}
    assert not capsys.readouterr().err


def test_it_is_the_suites_checkout_whatever_git_is_at_work_around_it(checkout, tmp_path, monkeypatch):
    """Started from a hook or a rebase of another checkout."""
    expected, other = head(checkout), tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("other")
    assert commit(other) != expected
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert fingerprint.git() == {"commit": expected, "dirty": False}


def test_a_suite_that_is_installed_within_a_checkout_has_no_commit(checkout, monkeypatch):
    inner = checkout / ".venv" / "koala"
    inner.mkdir(parents=True)
    monkeypatch.setattr(fingerprint, "PACKAGE", inner)
    assert fingerprint.git() == {"commit": None, "dirty": None}


def test_a_checkout_that_cannot_be_read_says_so_once(checkout, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    for _ in range(2):
        assert fingerprint.git() == {"commit": None, "dirty": None}
    assert len(capsys.readouterr().err.splitlines()) == 1
