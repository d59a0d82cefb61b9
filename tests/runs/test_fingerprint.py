"""What a record says of the checkout that made it."""

import subprocess

from koala import fingerprint


def test_a_checkout_with_sources_that_git_does_not_know_is_no_clean_commit(tmp_path, monkeypatch):
    package = tmp_path / "koala"
    package.mkdir()
    (package / "code.py").write_text("x = 1\n")
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(fingerprint, "PACKAGE", package)
    (tmp_path / "notes.txt").write_text("of somebody's")
    assert fingerprint.git()["dirty"] is False
    (package / "new.py").write_text("x = 2\n")
    assert fingerprint.git()["dirty"] is True
