"""What changes the name of the sources: code, in every way, and nothing that people write for people."""

import ast
import subprocess

import pytest

from koala import fingerprint

SOURCE = '''"""A module."""

import math  # the sine

NAMES = ("a"  # first
         "b")
TEXT = """one

# not a comment
  two"""


def rate(step):  # "quoted"
    """Of a step: α, """
    # Why so.
    if step:
        step += 1
        step *= 2
    if not step:
        return f"{step}# {math.pi}" + "#"
    "a string that nobody reads"
    return 0.5 * math.sin(step)


class Thing:
    """Has a docstring alone."""
'''
IN_WORDS = [
    ('"""A module."""\n', ""),
    ('"""A module."""', "'''Another\n\nmodule, with a # in it.'''  # and a comment"),
    ("  # the sine", ""),
    ("# the sine", '# """ the cosine: π'),
    ("  # first", ""),
    ('("a"  # first', '("a"\n         # on a line of its own'),
    ('"""Of a step: α, """', '"""Of a step: αβγ.\n\n    At length.   \n    """  # β'),
    ("    # Why so.\n", "\n   \n# At the margin.\n"),
    ('    "a string that nobody reads"\n', ""),
    ("import math", "\n\nimport math"),
    ("alone.", "alone, still."),
]
IN_CODE = [
    ("0.5", "0.25"),
    (" * ", " + "),
    ("import math", "import cmath as math"),
    ("        step *= 2", "    step *= 2"),
    ('"#"', '"##"'),
    ("# {math.pi}", "{math.pi}"),
    ("# not a comment", "# not a remark"),
    ("one\n\n", "one\n"),
    ("one\n", "one  \n"),
    ("  two", " two"),
    ('"b"', '"c"'),
    ("rate(step)", "rate(steps)"),
    ("\n\nclass", "\n\n@decorated\nclass"),
]


def named(tmp_path, monkeypatch, source: str) -> str:
    folder = tmp_path / "optim"
    folder.mkdir(exist_ok=True)
    (folder / "code.py").write_bytes(source.encode())
    monkeypatch.setattr(fingerprint, "PACKAGE", tmp_path)
    return fingerprint.sources.__wrapped__()


@pytest.mark.parametrize("was, now", IN_WORDS)
def test_words_for_people_change_no_name(was, now, tmp_path, monkeypatch):
    assert SOURCE.count(was) == 1
    edited = SOURCE.replace(was, now)
    ast.parse(edited)
    assert named(tmp_path, monkeypatch, edited) == named(tmp_path, monkeypatch, SOURCE)


@pytest.mark.parametrize("was, now", IN_CODE)
def test_every_edit_of_code_changes_it(was, now, tmp_path, monkeypatch):
    assert was in SOURCE
    edited = SOURCE.replace(was, now, 1)
    ast.parse(edited)
    assert named(tmp_path, monkeypatch, edited) != named(tmp_path, monkeypatch, SOURCE)


def test_line_ends_of_another_system_are_the_same_code(tmp_path, monkeypatch):
    assert named(tmp_path, monkeypatch, SOURCE.replace("\n", "\r\n")) == named(tmp_path, monkeypatch, SOURCE)


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


def test_what_counts_as_code_is_all_that_runs():
    """Against Python itself: the syntax tree of what is kept is that of the file without its docstrings."""
    compared = 0
    for path in (path for part in fingerprint.DECIDING for path in (fingerprint.PACKAGE / part).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        for node in ast.walk(tree):
            for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
                if isinstance(body, list):
                    body[:] = [item for item in body if not _docstring(item)]
        try:
            assert ast.dump(ast.parse(fingerprint.code(source))) == ast.dump(tree), path
        except IndentationError:  # a class that is but its docstring
            continue
        compared += 1
    assert compared > 30


def _docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)
