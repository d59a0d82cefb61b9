"""What made a number: a digest of the sources that decide it, their checkout, and the versions beneath them."""

import ast
import functools
import hashlib
import io
import subprocess
import sys
import tokenize
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
DECIDING = ("data", "models", "optim", "training")  # a table, a launcher or a message changes no number
BASELINES = ("baselines",)  # change those of their own optimizers
BENEATH = ("torch", "torchvision", "numpy", "timm", "pytorch-optimizer", "pillow", "datasets")


@functools.cache
def sources(packages: tuple[str, ...] = DECIDING) -> str:
    """16 hexadecimal digits that name every source file below these packages of koala and its content.

    Of Python files that is the code: a comment or a docstring changes no number.
    """
    digest = hashlib.sha256()
    for path in sorted(path for part in packages for path in (PACKAGE / part).rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            content = path.read_bytes()
            if path.suffix == ".py":
                content = code(content.decode()).encode()
            digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def optimizer_of(config: dict) -> str:
    """The package that the optimizer of a run's configuration is from: torch, pytorch_optimizer, koala (whose filters
    are among the sources of every run) or koala.baselines; "" where the configuration names none."""
    target = (config.get("optim") or {}).get("_target_", "")
    return "koala.baselines" if target.startswith("koala.baselines.") else target.partition(".")[0]


def code(source: str) -> str:
    """Python source without comments, docstrings, blank lines and trailing blanks.

    They are cut out by their place: how tokens and syntax trees are written down depends on the version of Python.
    """
    lines = source.replace("\r\n", "\n").split("\n")
    source = "\n".join(lines)
    cuts, within, touched = [], set(), set()  # `within`: numbers of the lines whose end is inside a string
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            cuts.append((token.start, token.end))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            ends = ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
            cuts.append(tuple((line, len(lines[line - 1].encode()[:at].decode())) for line, at in ends))
        elif isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str):
            within.update(range(node.lineno, node.end_lineno))
    for (first, start), (last, end) in sorted(cuts, reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:], *[""] * (last - first)]
        touched.update(range(first, last + 1))
    within -= touched
    kept = (line if number in within else line.rstrip() for number, line in enumerate(lines, 1))
    return "\n".join(line for number, line in enumerate(kept, 1) if line or number in within)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computes the numbers beneath the suite, and of the suite; of what is installed."""
    import torch

    from koala import __version__

    found = {"python": sys.version.split()[0], "koala": __version__}
    for name in BENEATH:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # a plain string for checkpoints; with its build, such as +cu130
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def git() -> dict:
    """Commit of the suite's checkout and whether tracked files differ from it; None for both outside git."""

    def ask(*arguments):
        done = subprocess.run(["git", "-C", str(PACKAGE.parent), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = ask("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(ask("status", "--porcelain", "-uno")) if commit else None}
    except FileNotFoundError:
        return {"commit": None, "dirty": None}
