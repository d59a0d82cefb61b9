"""Bad input gets one message that names the key, the value and what is valid; the run's name holds what matters."""

import pytest

from koala.errors import ConfigError
from koala.training import compose, run_dir

BAD = {
    "unknown key": (["foo=1"], ["foo", "batch_size", "epochs"]),
    "added key": (["+bar=1"], ["bar", "valid", "epochs"]),
    "misspelt key": (["epoch=3"], ["did you mean epochs"]),
    "unknown optimizer": (["optim=koala-z"], ["koala-z", "koala-m", "sgd"]),
    "unknown data set": (["data=mnist"], ["mnist", "digits", "cifar100"]),
    "unknown model": (["model=vgg"], ["vgg", "resnet18"]),
    "unknown optimizer key": (["optim.momentum=0.9"], ["optim.momentum", "alpha_r", "lr"]),
    "unknown data key": (["data.pth=x"], ["data.pth", "did you mean path"]),
    "wrong type": (["epochs=abc"], ["epochs", "abc", "Integer"]),
    "wrong type in a group": (["optim.lr=fast"], ["optim.lr", "fast", "number"]),
    "no epochs": (["epochs=0"], ["epochs=0", "1 or more"]),
    "no batch": (["batch_size=0"], ["batch_size=0", "1 or more"]),
    "negative rate": (["optim.lr=-1"], ["lr", "-1"]),
    "negative rate of torch's": (["optim=adam", "optim.lr=-1"], ["adam", "-1"]),
    "precision": (["precision=fp8"], ["fp8", "fp32", "bf16"]),
    "strategy": (["strategy=zero"], ["zero", "ddp", "fsdp"]),
    "number of GPUs": (["num_gpus=all"], ["num_gpus=all", "auto"]),
    "selection": (["select=best-test"], ["best-test", "best-val"]),
    "grad_clip": (["grad_clip=-1"], ["grad_clip=-1", "above 0"]),
}


@pytest.mark.parametrize("overrides, named", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(overrides, named):
    with pytest.raises(ConfigError) as error:
        compose(["data=digits", *overrides])
    for word in named:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


RUN_TIME = {
    "a language model on images": (["model=tiny-lstm"], ["tiny-lstm", "text", "images"]),
    "an image model on text": (["data=pydocs", "model=resnet18"], ["resnet18", "images", "text"]),
    "a batch larger than the set": (["batch_size=5000"], ["5000", "1257"]),
    "more GPUs than there are": (["num_gpus=64"], ["num_gpus=64", "this machine has"]),
    "fewer samples than ranks": (["batch_size=2", "accumulation=4"], ["batch_size=2", "4"]),
    "no validation set to select on": (["data.validation=0", "select=best-val"], ["select=best-val", "validation"]),
    "no validation set for the schedule": (["data.validation=0", "schedule=plateau"], ["plateau", "validation"]),
    "several nodes from one process": (["num_nodes=2"], ["num_nodes=2", "torchrun", "slurm"]),
    "text in pieces": (["data=pydocs", "model=tiny-lstm", "accumulation=2"], ["accumulation=2", "language"]),
}


@pytest.mark.parametrize("overrides, named", RUN_TIME.values(), ids=RUN_TIME.keys())
def test_what_does_not_fit_together_is_named_and_leaves_no_record(runs, overrides, named):
    with pytest.raises(ConfigError) as error:
        runs.launch(*overrides)
    for word in named:
        assert word in str(error.value)
    folder = runs.folder(*overrides)
    assert not (folder / "record.json").exists() and not (folder / "metrics.jsonl").exists()


def test_the_door_exits_with_2_and_one_line(run_door):
    done = run_door("train.py", "data=digits", "optim=koala-z")
    assert done.returncode == 2
    assert "koala-z" in done.stderr and "koala-m" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_names_every_key_and_group(run_door):
    done = run_door("train.py", "--help")
    assert done.returncode == 0
    for word in ("checkpoint_every", "num_gpus", "koala-m", "cifar100", "tiny-lstm", "Exit status"):
        assert word in done.stdout


def test_a_data_set_brings_its_model_and_schedule_unless_told_otherwise():
    cfg = compose(["data=pydocs"])
    assert (cfg.model.name, cfg.schedule.name) == ("tiny-lstm", "plateau")
    cfg = compose(["data=pydocs", "model=tiny-transformer", "schedule=cosine"])
    assert (cfg.model.name, cfg.schedule.name) == ("tiny-transformer", "cosine")


@pytest.mark.parametrize(
    "override",
    [
        "epochs=7",
        "optim.lr=0.5",
        "batch_size=48",
        "precision=bf16",
        "model.width=32",
        "wrapper=swa",
        "max_steps=3",
        "grad_clip=1.0",
        "schedule=cosine",
    ],
)
def test_what_changes_the_numbers_changes_the_run(override):
    assert run_dir(compose(["data=digits", override])) != run_dir(compose(["data=digits"]))


@pytest.mark.parametrize(
    "override",
    [
        "data_root=elsewhere",
        "logger=none",
        "num_gpus=0",
        "cpu_procs=2",
        "checkpoint_every=0",
        "log_every=1",
        "compile=true",
        "resume=false",
    ],
)
def test_what_does_not_change_the_numbers_does_not_change_the_run(override):
    assert run_dir(compose(["data=digits", override])) == run_dir(compose(["data=digits"]))


def test_seeds_of_a_run_lie_side_by_side():
    first, second = (run_dir(compose(["data=digits", f"seed={seed}"])) for seed in (1, 2))
    assert first.parent == second.parent and (first.name, second.name) == ("seed1", "seed2")


def test_the_shell_completes_group_options(run_door):
    line = "python train.py optim=koala"
    done = run_door("train.py", "-sc", "query=bash", env={"COMP_LINE": line, "COMP_POINT": str(len(line))})
    assert {"optim=koala-v", "optim=koala-m", "optim=koala++"} <= set(done.stdout.split())
