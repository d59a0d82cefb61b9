"""What made a number: the checkout, and the versions of the libraries beneath it."""

import functools
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
BENEATH = (
    "torch", "torchvision", "numpy", "timm", "pytorch-optimizer", "curvlinops-for-pytorch", "pillow", "datasets",
)  # fmt: skip

# Variables by which git, in a hook or a rebase, leads its children to the checkout that it works on.
ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computes the numbers beneath the suite, and of the suite; of what is installed."""
    import torch

    from koala import __version__

    versions = {"python": sys.version.split()[0], "koala": __version__}
    for name in BENEATH:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    versions["torch"] = str(torch.__version__)  # a plain string for checkpoints; with its build, such as +cu130
    if torch.cuda.is_available():
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return versions


def git() -> dict:
    """Commit of the suite's checkout and whether it is all there is: no tracked file differs, and no file of the
    package is unknown to it; None for both outside of a checkout, and where git cannot read it, with one warning."""
    root = PACKAGE.parent
    unknown = {"commit": None, "dirty": None}
    if not (root / ".git").exists():  # installed, perhaps within somebody's own checkout
        return unknown
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "-uno")
        changed = changed or _git(root, "status", "--porcelain", "-unormal", "--", str(PACKAGE))
        return {"commit": commit, "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError) as error:
        _warn(root, " ".join((getattr(error, "stderr", None) or str(error)).split()))
        return unknown


def _git(root: Path, *arguments: str) -> str:
    """What git answers of the checkout in `root`: of nothing else, and also where somebody else owns it (root, in a
    container)."""
    environment = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    command = ["git", "--no-optional-locks", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


@functools.cache
def _warn(root: Path, reason: str) -> None:
    print(f"git cannot read {root}, so records will not name their commit: {reason}", file=sys.stderr)
