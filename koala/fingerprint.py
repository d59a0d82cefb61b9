"""What made a number: a digest of the sources that decide it, their checkout, and the versions beneath them."""

import functools
import hashlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
DECIDING = ("data", "models", "optim", "training")  # a table, a launcher or a message changes no number
BENEATH = ("torch", "torchvision", "numpy", "timm", "pytorch-optimizer", "pillow", "datasets")


@functools.cache
def sources() -> str:
    """16 hexadecimal digits that name the content of every source file below koala/{data,models,optim,training}."""
    digest = hashlib.sha256()
    for path in sorted(path for part in DECIDING for path in (PACKAGE / part).rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


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
