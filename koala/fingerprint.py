"""What made a number: the checkout, and the versions of the libraries beneath it."""

import functools
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
BENEATH = (
    "torch", "torchvision", "numpy", "timm", "pytorch-optimizer", "curvlinops-for-pytorch", "pillow", "datasets",
)  # fmt: skip


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
