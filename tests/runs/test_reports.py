"""What users of neighbouring projects reported, tried on this suite: docs/faults.md has the table."""

import subprocess
import sys

import pytest

from koala.runs import compose
from koala.runs.overrides import command_line
from koala.runs.sweep import check_sweep
from tests.refused import refused

SMALL = ["data=digits", "model=mlp", "num_gpus=0", "logger=none"]
FOLDERS = ["user@host", "%j", "a#b", "a=b", "a&b;c", "$HOME", "x:y", "{a}", "a!", "'q'", '"q"', "a b", "a,b (1)", "~x"]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("multirun", [False, True])
def test_a_folder_may_be_called_anything(name, multirun):
    """hydra 962, 1074, 1314, 2705."""
    typed = [*SMALL, f"output_root=/tmp/{name}" if "," not in name else f"output_root='/tmp/{name}'"]
    (cfg,) = check_sweep(command_line(["-m", *typed])).runs.values() if multirun else [compose(command_line(typed))]
    assert cfg.output_root == f"/tmp/{name}"


def test_a_comma_in_quotes_is_no_sweep():
    """hydra 573."""
    assert list(check_sweep(command_line(["-m", *SMALL, "output_root='a,b'", "seed=1,2"])).runs) == ["seed=1", "seed=2"]


def test_a_key_of_a_swept_group_is_set_in_every_run():
    """hydra 283, 2888: koala-m, the default, has no such key."""
    runs = check_sweep(command_line(["-m", *SMALL, "optim=sgd,adam", "optim.maximize=true"])).runs
    assert {name: cfg.optim.maximize for name, cfg in runs.items()} == {"optim=sgd": True, "optim=adam": True}


@pytest.mark.parametrize("key", ["output_root", "epochs", "optim.lr"])
def test_a_value_that_is_missing_is_named(key):
    with refused(key):
        compose([*SMALL, f"{key}=???"])


def test_a_path_that_is_no_text_in_this_locale_is_refused_with_what_to_set():
    """SkillOpt 124: a locale that is not UTF-8, as ssh and cron leave it."""
    with refused("output_root", mentions="LC_ALL"):
        compose([*SMALL, "output_root=/tmp/gr\udcc3\udcb6sse"])


@pytest.mark.parametrize(
    "parts", [["output_root=\\${seed}"], ["logger.project=$", "output_root=${logger.project}{oc.env:HOME}"]]
)
def test_what_is_resolved_is_not_resolved_again(parts):
    """Tried beside these: the second pass evaluated an escaped value, and one that was put together from parts."""
    with refused("output_root"):
        compose([*SMALL, "logger=wandb", *parts])


@pytest.mark.parametrize("whole", [False, True])
def test_a_sweepers_parameters_are_checked_before(whole):
    """Tried beside these: as one mapping they were not."""
    typed = "hydra.sweeper.params={{seed:'1,{}'}}" if whole else "hydra.sweeper.params.seed='1,{}'"
    assert list(check_sweep(command_line(["-m", *SMALL, typed.format(2)])).runs) == ["seed=1", "seed=2"]
    with refused("seed", -1):
        check_sweep(command_line(["-m", *SMALL, typed.format(-1)]))


@pytest.mark.parametrize("closed", ["", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_were_closed_at_the_start(closed, tmp_path):
    """A daemon's descriptors: a file that is opened gets none of theirs, and a line that is printed goes nowhere."""
    code = """import sys
from koala.terminal import protect_streams
protect_streams()
file = open(sys.argv[1], "w")
print(sys.stdin.read(), file=sys.stderr, flush=True)
print("told", flush=True)
file.write(str(file.fileno()))"""
    written = tmp_path / "number"
    shell = f'exec "$0" -c "$1" "$2" {closed or "</dev/null"}'
    done = subprocess.run(["bash", "-c", shell, sys.executable, code, str(written)], stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and int(written.read_text()) > 2
