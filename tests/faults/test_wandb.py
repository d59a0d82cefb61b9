"""Weights & Biases out of reach, silent or killed, and keys in the environment: runs continue, keys stay secret."""

import socket
import threading

import pytest

from koala import records
from koala.runs import compose, run_dir

pytestmark = pytest.mark.extended

RUN = ["data=digits", "batch_size=64", "model=mlp", "num_gpus=0", "logger=wandb"]
KEY = "0123456789abcdef0123456789abcdef01234567"


def online(port: int) -> dict[str, str]:
    """An environment in which W&B is to be mirrored to a server on this machine."""
    return {"WANDB_MODE": "online", "WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{port}"}


@pytest.fixture
def silent_server():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def accept():
            try:
                while True:
                    held.append(server.accept()[0])
            except OSError:
                return  # closed: the test has ended

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        for connection in held:
            connection.close()


@pytest.fixture
def closed_port():
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def test_server_that_does_not_answer(closed_port, silent_server, start_door, folders):
    """One that is not there and one that is silent, at once: W&B is given its 20 seconds."""
    runs = {port: [*RUN, "epochs=2", f"seed={port}", *folders] for port in (closed_port, silent_server)}
    lives = [(run, start_door("train.py", *run, env=online(port))) for port, run in runs.items()]
    for run, life in lives:
        assert life.wait(240) == 0, life.log.read_text()
        record = records.read_record(run_dir(compose(run)))
        assert record["status"] == "finished" and record["epochs"] == 2
        assert "Traceback" not in life.log.read_text()


KILLED = """
import os, signal, sys
from pathlib import Path
from koala.runs import compose, launch
from koala.training.monitor import Monitor

def services():  # children of any thread of this process
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"PPid:\\t{os.getpid()}\\n" in (folder / "status").read_text()
            if ours and "wandb-core" in (folder / "cmdline").read_text():
                yield int(folder.name)
        except OSError:
            continue  # it has ended

def row_and_kill(monitor, row, usual=Monitor.row):
    usual(monitor, row)
    if row["epoch"] == 2:
        [service] = services()
        os.kill(service, signal.SIGKILL)
        print("killed", flush=True)

Monitor.row = row_and_kill
launch(compose(sys.argv[1:]))
"""


def test_killed_w_and_b_process(start_door, folders):
    """W&B's own process is killed after the second epoch, by the run itself, so that no machine misses the moment."""
    run = [*RUN, "epochs=4", *folders]
    training = start_door("-c", KILLED, *run)
    assert training.wait(240) == 0, training.log.read_text()
    assert training.log.read_text().count("killed") == 1
    folder = run_dir(compose(run))
    assert records.read_record(folder)["status"] == "finished" and len(records.read_history(folder)) == 4


def test_a_wandb_that_cannot_be_imported(run_door, folders, tmp_path):
    """As with a protobuf that it does not fit."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/wandb.py").write_text("raise ImportError('cannot import name x')")
    done = run_door("train.py", *RUN, "epochs=1", *folders, env={"PYTHONPATH": str(tmp_path / "broken")})
    assert done.returncode == 0 and "W&B" in done.stderr, done.stderr
    assert records.read_record(run_dir(compose([*RUN, "epochs=1", *folders])))["status"] == "finished"


def test_no_secret_of_the_environment_is_written(run_door, folders, tmp_path):
    secrets = {"WANDB_API_KEY": KEY, "HF_TOKEN": "hf_thisIsNobodysToken", "AWS_SECRET_ACCESS_KEY": "aws/nobodys/key"}
    done = run_door("train.py", *RUN, "epochs=1", *folders, env=secrets)
    assert done.returncode == 0, done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in written) and any(path.name == "record.json" for path in written)
    for path in written:
        content = path.read_bytes()
        assert not [name for name, value in secrets.items() if value.encode() in content], path
