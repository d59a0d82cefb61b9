"""Fixtures of all tests: one thread, nothing online, outputs below tmp_path, the doors as processes."""

import os

# Set before torch is imported, here or in a subprocess: xdist workers on few cores are fastest with a thread each,
# and sums do not depend on the machine's number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import multiprocessing
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Processes forked from a server that has imported everything and computed nothing.
CONTEXT = multiprocessing.get_context("forkserver")
DOORS = ["koala.reproduce.cli", "koala.tables.cli"]
CONTEXT.set_forkserver_preload(["tests.faults.conftest", "torch._dynamo", "koala.models", "sklearn.datasets", *DOORS])


def fork_ranks(work, *args, world: int) -> None:
    """Calls ``work(rank, *args)`` in ``world`` processes, and raises what one of them raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests")  # where the ranks find the module of `work`
        mp.start_processes(work, args=args, nprocs=world, start_method=CONTEXT.get_start_method())


def pytest_collection_modifyitems(items):
    """Skip what this machine cannot run, and keep the tests that share one Slurm in one xdist worker."""
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.xdist_group("slurm"))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """The last line says so where the tests that need a Slurm did not run."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = (
        [report for report in reporter.stats.get("skipped", ()) if "slurm" in getattr(report, "keywords", ())]
        if reporter
        else []
    )
    if skipped:
        reason = skipped[0].longrepr[2].removeprefix("Skipped: ")
        reporter.write_line(f"{len(skipped)} tests of Slurm did not run: {reason}")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real data sets and golden files: ``$KOALA_SHARED``, or ``shared`` beside the checkout."""
    folder = Path(os.environ.get("KOALA_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder} (set KOALA_SHARED)")
    return folder


@pytest.fixture
def folders(tmp_path) -> list[str]:
    """The overrides that keep a run and its data below ``tmp_path``."""
    return [f"output_root={tmp_path}/outputs", f"data_root={tmp_path}/data"]


@pytest.fixture
def run_door(tmp_path):
    """A function that runs a script of the repository as a user would, from the repository's root.

    ``run_door("train.py", "epochs=1", env={}, timeout=120) -> CompletedProcess``; its text is captured, and a
    non-zero status is not raised. ``output_root`` and ``data_root`` of train.py go below ``tmp_path`` unless given.
    With an environment of its own it is a new interpreter, otherwise a fork, which saves seconds of imports.
    """

    def run(script: str, *args: str, env: dict | None = None, timeout: float = 120):
        command = door_command(script, args, tmp_path)
        if env is None:
            return run_forked(command, tmp_path / "printed", timeout)
        command, env = [sys.executable, *command], own_environment(env)
        return subprocess.run(command, cwd=ROOT, env=env, timeout=timeout, capture_output=True, text=True)

    return run


def run_forked(command: list[str], printed: Path, timeout: float) -> subprocess.CompletedProcess:
    """``python *command`` in a process forked from the server, with its text in files that begin with ``printed``."""
    streams = [printed.with_suffix(suffix) for suffix in (".out", ".err")]
    process = CONTEXT.Process(target=walk_through, args=(command, own_environment(), *streams))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(command, timeout, *(stream.read_bytes() for stream in streams))
    return subprocess.CompletedProcess(command, process.exitcode, *(stream.read_text() for stream in streams))


def walk_through(command: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """What the interpreter does with ``command``."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent.resolve()))
    runpy.run_path(command[0], run_name="__main__")


@pytest.fixture
def start_door(tmp_path):
    """As ``run_door``, but returns a Popen while the script runs, with its output in the file ``Popen.log``.

    The script leads a process group of its own, which is killed when the test ends.
    """
    started: list[subprocess.Popen] = []

    def start(script: str, *args: str, env: dict | None = None) -> subprocess.Popen:
        log = tmp_path / f"door-{len(started)}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, *door_command(script, args, tmp_path)],
                cwd=ROOT,
                env=own_environment(env),
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        process.log = log
        started.append(process)
        return process

    yield start
    for process in started:
        kill_group(process)


def own_environment(env: dict | None = None) -> dict[str, str]:
    """This process's environment and ``env``, without the W&B process that a test in this process may have started.

    W&B names it there, and a script that finds it uses it in place of one of its own.
    """
    return {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"} | (env or {})


def door_command(script: str, args: tuple[str, ...], tmp_path: Path) -> list[str]:
    """``script`` and ``args``; outputs and caches of train.py go below ``tmp_path`` unless ``args`` say where."""
    command = [script, *args]
    asks_hydra = any(arg.startswith("-") and arg not in ("-m", "--multirun") for arg in args)  # such as --help
    if script == "train.py" and not asks_hydra:
        for key, folder in (("output_root", "outputs"), ("data_root", "data")):
            if not any(arg.startswith(f"{key}=") for arg in args):
                command.append(f"{key}={tmp_path / folder}")
    return command


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL a process started as leader of its own group, with all that it started there, and reap it."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass  # all of it has ended by itself
    process.wait()
