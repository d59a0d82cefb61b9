"""What made a number: a digest of the sources that decide it, their checkout, and the versions beneath them."""

import ast
import functools
import hashlib
import importlib
import inspect
import io
import subprocess
import sys
import tokenize
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
DECIDING = ("data", "models", "optim", "training")  # a table, a launcher or a message changes no number
BASELINES = ("baselines",)  # change those of their own optimizers
BENEATH = (
    "torch", "torchvision", "numpy", "timm", "pytorch-optimizer", "curvlinops-for-pytorch", "pillow", "datasets",
)  # fmt: skip


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


def decides(config: dict) -> list[str]:
    """What decides the numbers of a run beside `sources`: names of libraries (as in BENEATH), and "baselines" where
    its optimizer is one of koala/baselines."""
    target = (config.get("optim") or {}).get("_target_", "")
    found = ["torch", "torchvision"]
    if (config.get("model") or {}).get("family") == "vit" or target.startswith("timm."):
        found.append("timm")
    if target.startswith(("pytorch_optimizer.", "koala.baselines.")):
        found.append("pytorch-optimizer")
    if target.startswith("koala.baselines."):
        found += ["curvlinops-for-pytorch"] if ".kfac." in target else []
        found.append("baselines")
    return found


def own_optimizer(target: str) -> str | None:
    """Digest of the file that defines the optimizer class `target`; None where a release or `sources` names its code:
    for ours and those of torch, pytorch_optimizer and timm."""
    if target.partition(".")[0] in ("koala", "torch", "pytorch_optimizer", "timm"):
        return None
    file = inspect.getsourcefile(importlib.import_module(target.rpartition(".")[0]))
    return hashlib.sha256(code(Path(file).read_text(encoding="utf-8")).encode()).hexdigest()[:16] if file else None


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
    """Commit of the suite's checkout and whether it is all there is: no tracked file differs, and no file of the
    package is unknown to it; None for both outside git."""

    def ask(*arguments):
        done = subprocess.run(["git", "-C", str(PACKAGE.parent), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = ask("rev-parse", "HEAD")
        changed = ask("status", "--porcelain", "-uno") or ask("status", "--porcelain", "-unormal", "--", str(PACKAGE))
        return {"commit": commit, "dirty": bool(changed) if commit else None}
    except FileNotFoundError:
        return {"commit": None, "dirty": None}
