"""train.py as a person meets it: one line and a status for each mistake, in any terminal."""

import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from koala.runs import compose, launch
from koala.runs.overrides import command_line
from tests.conftest import ROOT
from tests.refused import assert_names, refused


def test_the_door_exits_with_2_and_one_line_whatever_the_environment_says_of_hydra(run_door):
    done = run_door("train.py", "data=digits", "optim=koala-z", env={"HYDRA_FULL_ERROR": "0"})
    assert done.returncode == 2
    assert_names(done.stderr, "optim=koala-z", "koala-m")


@pytest.mark.extended
def test_an_unknown_option_of_a_group_within_a_group_is_named(run_door):
    done = run_door("train.py", "-m", "data=digits", "hydra/launcher=slrum")
    assert done.returncode == 2
    assert_names(done.stderr, "hydra/launcher=slrum", "slurm", "basic")


def test_a_run_that_is_asked_for_on_slurm_is_not_made_here(run_door, tmp_path):
    done = run_door("train.py", "data=digits", "model=mlp", "num_gpus=0", "max_steps=1", "hydra/launcher=slurm")
    assert done.returncode == 2 and not list(tmp_path.rglob("record.json"))
    assert_names(done.stderr, "hydra/launcher=slurm")


def test_help_names_every_key_and_group(run_door):
    done = run_door("train.py", "--help")
    assert done.returncode == 0
    for word in ("checkpoint_every", "num_gpus", "koala-m", "cifar100", "tiny-lstm"):
        assert word in done.stdout


def test_the_published_command_line_is_understood():
    assert command_line(["--optim", "koala-m", "--data=cifar100", "--batch-size", "64"]) == [
        "optim=koala-m", "data=cifar100", "batch_size=64"
    ]  # fmt: skip
    swept = ["++optim.lr=0.1", "seed=1,2", "-m", "--config-dir", "mine"]  # the only order that Hydra's parser takes
    assert command_line(["--optim.lr", "0.1", "-m", "--config-dir", "mine", "seed=1,2"]) == swept
    assert command_line(["--cfg", "job", "--multirun"]) == ["--cfg", "job", "--multirun"]  # Hydra's own
    assert command_line(["--lr", "0.1"]) == ["lr=0.1"]  # refused as a key, with the closest ones
    with refused("--optim"):
        command_line(["--optim", "data=digits"])


def test_places_need_no_quotes_for_hydra(monkeypatch):
    monkeypatch.setenv("HOME", "/home/josé")
    typed = ["output_root=/tmp/ü (1)", "--data-root", "~/data", "optim.lr==1", "seed", "-m", "--config-dir=/ü"]
    assert command_line(typed) == [
        "output_root='/tmp/ü (1)'", "data_root='/home/josé/data'", "++optim.lr='=1'", "seed", "-m", "--config-dir=/ü"
    ]  # fmt: skip
    assert compose(["data=digits", "num_gpus=0", "output_root=/tmp/it's [ü"]).output_root == "/tmp/it's [ü"


@pytest.mark.parametrize("value", ["2024_01_15", "1e3", "007", "true", "of blanks ", "1_000.5"])
@pytest.mark.parametrize("key", ["output_root", "data_root", "data.path", "logger.group", "data.hub_revision"])
def test_what_names_a_folder_is_text_whatever_it_looks_like(key, value):
    (override,) = command_line([f"{key}={value}"])
    parsed = OverridesParser.create().parse_override(override)
    assert parsed.key_or_group == key and parsed.value() == value


def test_a_sweep_over_folders_and_no_folder_at_all_stay_what_they_are():
    assert command_line(["output_root=a,2024_01"]) == ["output_root=a,'2024_01'"]
    assert command_line(["data.path=null", "data_root=${output_root}", "output_root='a,b'"]) == [
        "++data.path=null", "data_root=${output_root}", "output_root='a,b'"
    ]  # fmt: skip


@pytest.mark.extended
def test_the_published_command_line_runs(run_door):
    done = run_door("train.py", "--optim", "koala-m", "--data", "digits", "--cfg", "job")
    assert done.returncode == 0 and "name: koala-m" in done.stdout and "name: digits" in done.stdout


@pytest.mark.extended
def test_help_into_a_closed_pipe_says_nothing():
    command = f"'{sys.executable}' train.py --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


@pytest.mark.extended
def test_a_terminal_that_knows_ascii_only(run_door):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_door("train.py", "data=digits", "optim=köala", env=ascii_only)
    assert done.returncode == 2 and done.stderr.isascii()
    assert_names(done.stderr, "koala-m")


@pytest.mark.extended
def test_a_folder_name_too_long_for_the_disk_is_one_line(tmp_path):
    with refused("output_root"):
        launch(compose(["data=digits", "model=mlp", "num_gpus=0", f"output_root={tmp_path}/{'x' * 300}"]))


@pytest.mark.extended
def test_the_shell_completes_group_options(run_door):
    line = "python train.py optim=koala"
    done = run_door("train.py", "-sc", "query=bash", env={"COMP_LINE": line, "COMP_POINT": str(len(line))})
    assert {"optim=koala-v", "optim=koala-m", "optim=koala++"} <= set(done.stdout.split())


@pytest.mark.extended
def test_a_person_may_read_the_environment_but_not_publish_a_secret(run_door):
    env = {"PLACE": "somewhere", "SOME_TOKEN": "0123456789abcdef"}
    for name, status in (("PLACE", 0), ("SOME_TOKEN", 2)):
        override = f"logger.project=${{oc.env:{name}}}"
        done = run_door("train.py", "data=digits", "model=mlp", "max_steps=1", "logger=wandb", override, env=env)
        assert done.returncode == status, done.stderr
        assert "0123456789abcdef" not in done.stdout + done.stderr
    assert_names(done.stderr, "logger.project", "SOME_TOKEN")


@pytest.mark.parametrize("key, value, valid", [("size", 9, "8"), ("channels", 3, "1"), ("classes", 7, "10")])
def test_a_set_that_is_not_what_the_keys_say_is_refused_before_there_is_a_folder(tmp_path, key, value, valid):
    with refused(f"data.{key}", value, valid):
        launch(
            compose(["data=digits", f"data.{key}={value}", "model=mlp", "num_gpus=0", f"output_root={tmp_path}/runs"])
        )
    assert not list(tmp_path.iterdir())
