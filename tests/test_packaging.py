"""The dependency files agree with each other and with the imports; set-up explains or mends what is wrong."""

import ast
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import koala
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
]


def pinned(lines) -> dict[str, str]:
    """``{canonical name: version}`` of lines ``name==version``; anything else but a comment is an error."""
    pins = {}
    for line in filter(None, (line.split("#")[0].strip() for line in lines)):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line), f"more than name==version: {line}"
        name, version = line.split("==")
        pins[canonicalize_name(name)] = version
    return pins


LOCK = pinned((ROOT / "requirements.lock").read_text().splitlines())


def test_the_version_is_the_same_wherever_it_is_written():
    """The next one with .dev0 until its release; pyproject.toml takes it from koala/__init__.py."""
    version = Version(koala.__version__)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == koala.__version__
    newest = re.search(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest[1] == version.base_version and (newest[2] == "unreleased") == version.is_devrelease


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda r: r.name)
def test_lock_holds_every_direct_dependency_within_its_bounds(requirement):
    bounds = {spec.operator for spec in requirement.specifier}
    assert ">=" in bounds and "<" in bounds, f"{requirement} has no lower or no upper bound"
    assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)])


def test_conda_environment_has_the_same_names_and_versions():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    options = [line for line in pip["pip"] if line.startswith("--")]
    assert options == ["--constraint requirements.lock", "--editable .[suite]"]
    assert pinned(line for line in pip["pip"] if line not in options) == {
        canonicalize_name(r.name): LOCK[canonicalize_name(r.name)] for r in DIRECT
    }


def test_lock_holds_every_indirect_dependency_of_this_environment():
    """Walks the installed metadata from the direct dependencies."""
    missing, todo, seen = set(), [(canonicalize_name(r.name), frozenset(r.extras)) for r in DIRECT], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name not in LOCK:
            missing.add(name)
            continue
        for requirement in map(Requirement, requires(name) or ()):
            environments = [{"extra": extra} for extra in extras or ("",)]
            if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert not missing, f"installed indirectly but not in requirements.lock: {sorted(missing)}"


def test_every_import_is_declared():
    """What works only because another package happens to bring it in breaks for users later."""
    imported: dict[str, str] = {}
    for file in filter(os.path.isfile, [ROOT / "train.py", *ROOT.glob("[kst]*/**/*.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            imported |= {name.split(".")[0]: str(file.relative_to(ROOT)) for name in names}
    # pytest requires packaging, pydantic its core, and torch triton where it has it; koala does without it elsewhere.
    declared = {canonicalize_name(r.name) for r in DIRECT} | {"packaging", "pydantic-core", "triton"}
    providers = packages_distributions()
    ours = {"koala", "tests", "train", "reproduce", "tables", "benchmark_training"} | set(sys.stdlib_module_names)
    undeclared = {
        name: file
        for name, file in imported.items()
        if name not in ours and not {canonicalize_name(d) for d in providers.get(name, ())} & declared
    }
    assert not undeclared, f"imported but not in pyproject.toml: {undeclared}"


QUICK = ("metric_verdict.py", "reproduce.py", "tables.py")  # the others import torch first
SCRIPTS = [
    pytest.param(path.name, marks=[] if path.name in QUICK else pytest.mark.slow)
    for path in sorted(ROOT.glob("scripts/*.py"))
    if path.name != "loss_compare.py"
]  # that trains with the checkout that PYTHONPATH names


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_the_koala_of_its_checkout(script, tmp_path):
    """Whichever is installed: what it reads and measures lies beside koala, and a wheel has no experiments."""
    for folder in ("checkout", "installed"):
        (tmp_path / folder / "koala").mkdir(parents=True)
        (tmp_path / folder / "koala/__init__.py").write_text(f"raise SystemExit('{folder}')\n")
    shutil.copytree(ROOT / "scripts", tmp_path / "checkout/scripts")
    command = [sys.executable, f"checkout/scripts/{script}"]
    installed = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True)
    assert done.stderr == "checkout\n"


# --- set-up, in a copy of what it reads, since the checkout's own .venv is in use


@pytest.fixture
def checkout(tmp_path):
    """A copy of what set-up reads, without an environment."""
    for name in ("pyproject.toml", "requirements.lock", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    (tmp_path / "koala").mkdir()
    return tmp_path


def set_up(checkout, *extras, **env) -> subprocess.CompletedProcess:
    """setup.sh with no package source at all: no index, no wheels, no cache, no configuration of pip."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1", "PIP_CONFIG_FILE": os.devnull}
    env = clean | offline | {"PYTHON": sys.executable} | env
    command = ["bash", "scripts/setup.sh", *extras]
    return subprocess.run(command, cwd=checkout, env=env, text=True, capture_output=True, timeout=120)


def fake_python(checkout, body: str) -> str:
    """An interpreter that runs ``body`` (bash), and the real Python where body does not exit."""
    path = checkout / "fake-python"
    path.write_text(f'#!/usr/bin/env bash\n{body}\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.extended
def test_no_network_and_no_cache_says_what_to_do_and_leaves_no_stamp(checkout):
    done = set_up(checkout)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(name in done.stderr for name in ("PIP_INDEX_URL", "PIP_FIND_LINKS", "koala-setup.log"))
    assert [f.name for f in (checkout / ".venv").glob("koala-setup*")] == ["koala-setup.log"]


def test_python_without_ensurepip_names_the_debian_package(checkout):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = fake_python(checkout, 'case "$*" in *ensurepip*|*"-m pip"*) exit 1;; esac')
    done = set_up(checkout, PYTHON=python)
    assert done.returncode == 1 and f"python{version}-venv" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("version", [(3, 10), (3, 15)])
def test_a_python_that_is_too_old_or_too_new_is_refused_with_the_ones_tried(checkout, version):
    python = fake_python(checkout, f'exec "{sys.executable}" -c "import sys; sys.version_info = {version}; $2"')
    done = set_up(checkout, PYTHON=python)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "fake-python" in done.stderr


def test_the_newest_python_is_taken(checkout):
    body = 'echo "${0##*/}" >> started; case "$*" in *version_info*) exit 0;; *) exit 1;; esac'
    for version in ("3.11", "3.12", "3.13", "3.14"):
        os.link(fake_python(checkout, body), checkout / f"python{version}")
    set_up(checkout, PYTHON="", PATH=f"{checkout}:{os.environ['PATH']}")
    assert set((checkout / "started").read_text().split()) == {"python3.14"}


def stamps(checkout, *extras) -> None:
    (checkout / ".venv").mkdir(exist_ok=True)
    command = "cat pyproject.toml requirements.lock | git hash-object --stdin"
    hashed = subprocess.check_output(command, shell=True, cwd=checkout, text=True).strip()
    for extra in extras:
        (checkout / f".venv/koala-setup-{extra}").write_text(f"{hashed} {checkout}\n")


def test_finished_set_up_starts_no_python(checkout):
    """What makes the second time cheap: stamps are compared by the shell alone."""
    stamps(checkout, "suite", "dev")
    python = fake_python(checkout, "touch started")
    assert set_up(checkout, "dev", PYTHON=python).returncode == 0
    assert set_up(checkout, PYTHON=python).returncode == 0
    assert not (checkout / "started").exists()
    # another extra, or another lock, is work to do
    assert set_up(checkout, "ecosystem", PYTHON=python).returncode == 1
    stamps(checkout, "suite")
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("# newer\n")
    assert set_up(checkout, PYTHON=python).returncode == 1


@pytest.mark.extended
def test_interrupted_set_up_starts_again(checkout):
    stamps(checkout, "suite")
    (checkout / ".venv/koala-setup-incomplete").touch()
    (checkout / ".venv/half-written").touch()
    set_up(checkout)
    assert not (checkout / ".venv/half-written").exists() and (checkout / ".venv/bin/python").exists()


def test_environment_of_someone_else_is_not_deleted(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv/precious").touch()
    assert set_up(checkout).returncode == 1
    assert (checkout / ".venv/precious").exists()


def test_two_set_ups_take_turns(checkout):
    """While one holds the lock the other waits, and finds the work done."""
    with (checkout / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        env = os.environ | {"PYTHON": sys.executable}
        second = subprocess.Popen(
            ["bash", "scripts/setup.sh"], cwd=checkout, env=env, stderr=subprocess.PIPE, text=True
        )
        assert second.stderr.readline()  # it says that it waits
        stamps(checkout, "suite")
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert second.wait(timeout=60) == 0
    assert sorted(f.name for f in (checkout / ".venv").iterdir()) == ["koala-setup-suite"]


def test_code_keeps_the_lint_rules_of_pyproject():
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--no-cache", "--output-format=concise"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
