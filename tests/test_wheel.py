"""The wheel, installed where torch and what torch requires are all there is, holds what the optimizers need."""

import subprocess
import sys
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

pytestmark = [pytest.mark.extended, pytest.mark.xdist_group(__name__)]  # one worker makes the environment

TRAIN = """
import sys, torch, koala
assert not {"hydra", "omegaconf", "wandb", "numpy", "datasets"} & set(sys.modules), "import koala takes more than torch"
infos = koala.list_optimizers()
for info in (info for info in infos if info.observes != "outputs"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    inputs, targets = torch.randn(64, 8), torch.randint(4, (64,))
    optimizer = koala.create_optimizer(info.name, model.parameters(), **{option})
    losses = []
    for _ in range(20):
        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), targets, reduction="none")
            loss.mean().backward()
            return loss
        losses.append(float(optimizer.step(closure).mean()))
    assert losses[-1] < losses[0], (info.name, losses)
    print(info.name, koala.__file__)
for info in (info for info in infos if info.observes == "outputs"):
    optimizer = koala.create_optimizer(info.name, model.parameters(), likelihood="categorical")
    optimizer.step(lambda: (model(inputs), targets))
    print(info.name, koala.__file__)
"""


def closure_of(name: str, result: set | None = None) -> set[str]:
    """The distribution ``name`` and all that it requires here."""
    result = set() if result is None else result
    if canonicalize_name(name) not in result:
        result.add(canonicalize_name(name))
        for requirement in map(Requirement, distribution(name).requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                closure_of(requirement.name, result)
                for extra in requirement.extras:
                    for item in map(Requirement, distribution(requirement.name).requires or ()):
                        if item.marker is not None and item.marker.evaluate({"extra": extra}):
                            closure_of(item.name, result)
    return result


@pytest.fixture(scope="module")
def lonely_python(tmp_path_factory):
    """An environment that holds the wheel, torch, and what torch requires."""
    folder = tmp_path_factory.mktemp("wheel")
    quiet = {"check": True, "capture_output": True, "text": True}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(folder / "source")]
    sources = ["koala", "pyproject.toml", "README.md", "LICENSE"]
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", *sources], cwd=ROOT, **quiet).stdout
    for name in listed.split():  # a copy: setuptools leaves build/ and egg-info beside the sources
        if (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, *build], **quiet)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], **quiet)
    python = folder / "venv/bin/python"
    site = next((folder / "venv/lib").glob("python*/site-packages"))
    (wheel,) = folder.glob("koala_optim-*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], **quiet)
    for name in closure_of("torch"):
        for file in distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(distribution(name).locate_file(top))
    return python


@pytest.mark.parametrize("option", ["{'fused': True}", "{'fused': False}"])
def test_every_optimizer_trains_from_the_wheel(lonely_python, tmp_path, option):
    command = [lonely_python, "-I", "-c", TRAIN.replace("{option}", option)]  # -I: no PYTHONPATH, no current folder
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all("site-packages" in line for line in done.stdout.splitlines()), done.stdout


def test_the_wheel_is_typed(lonely_python, tmp_path):
    typed = "import koala, pathlib; assert (pathlib.Path(koala.__file__).parent / 'py.typed').exists()"
    subprocess.run([lonely_python, "-I", "-c", typed], cwd=tmp_path, check=True)
