"""Bad input gets one line that names the key, the value and what is valid, before any folder exists."""

import math

import hydra
import pytest
from omegaconf import OmegaConf

from koala.runs import compose, launch, run_dir
from koala.runs.overrides import hydra_config, readable
from koala.runs.schema import CONFIGS
from tests.refused import refused

NAN = float("nan")
BAD = {
    "unknown key": (["foo=1"], "foo", None, "batch_size"),
    "added key": (["+bar=1"], "bar", None, "epochs"),
    "misspelt key": (["epoch=3"], "epoch", None, "epochs"),
    "unknown optimizer": (["optim=koala-z"], "optim", "koala-z", "koala-m"),
    "unknown data set": (["data=digit"], "data", "digit", "digits"),
    "unknown model": (["model=vgg"], "model", "vgg", "resnet18"),
    "unknown optimizer key": (["optim.momentum=0.9"], "optim.momentum", None, "alpha_r"),
    "misspelt argument of a constructor": (["optim=sgd", "optim.nestrov=true"], "optim.nestrov", None, "nesterov"),
    "misspelt argument of one that swallows any": (["optim=yogi", "optim.epz=1"], "optim.epz", None, "eps"),
    "a key of a group without its group": (["lr=0.1"], "lr", None, "optim.lr"),
    "unknown data key": (["data.pth=x"], "data.pth", None, "path"),
    "unknown model key": (["model.widht=8"], "model.widht", None, "width"),
    "wrong type": (["epochs=abc"], "epochs", "abc"),
    "a number for a truth": (["compile=1"], "compile", 1),
    "a truth for a number": (["seed=true"], "seed", True),
    "no number": (["checkpoint_every=nan"], "checkpoint_every", NAN),
    "wrong type in a group": (["optim.lr=fast"], "optim.lr", "fast"),
    "no rate": (["optim.lr=null"], "optim.lr", "null"),
    "no epochs": (["epochs=0"], "epochs", 0),
    "no batch": (["batch_size=0"], "batch_size", 0),
    "negative rate": (["optim.lr=-1"], "optim", "koala-m"),
    "negative rate of torch's": (["optim=adam", "optim.lr=-1"], "optim", "adam"),
    "too few betas": (["optim=adam", "optim.betas=[]"], "optim.betas.0", None),
    "a beta of 1": (["optim=adam", "optim.betas=[0.9,1]"], "optim", "adam"),
    "no optimizer": (["optim=null"], "optim", "null", "koala-m"),
    "a group switched off": (["logger=false"], "logger", "false", "none"),
    "no data": (["data=null"], "data", "null", "digits"),
    "no model": (["~model"], "model", "null", "resnet18"),
    "no class": (["~optim._target_"], "optim._target_", "null"),
    "a class that is no optimizer": (
        ["optim._target_=types.SimpleNamespace"],
        "optim._target_",
        "types.SimpleNamespace",
    ),
    "a class that is nowhere": (["optim._target_=nowhere.At"], "optim._target_", "nowhere.At"),
    "precision": (["precision=fp8"], "precision", "fp8"),
    "strategy": (["strategy=zero"], "strategy", "zero"),
    "number of GPUs": (["num_gpus=all"], "num_gpus", "all"),
    "number of ranks": (["ranks=0"], "ranks", 0),
    "selection": (["select=best-test"], "select", "best-test"),
    "grad_clip": (["grad_clip=-1"], "grad_clip", -1),
    "milestones that are words": (["schedule.milestones=[a]"], "schedule.milestones", "a"),
    "one milestone": (["schedule.milestones=3"], "schedule.milestones", 3),
    "no milestones": (["schedule.milestones={}"], "schedule.milestones", "{}"),
    "negative warm-up": (["schedule=cosine", "schedule.warmup=-3"], "schedule.warmup", -3),
    "a warm-up without end": (["schedule=cosine", "schedule.warmup=9", "epochs=9"], "schedule.warmup", 9.0),
    "a rate that rises": (["schedule=plateau", "schedule.gamma=2"], "schedule.gamma", 2),
    "no steps between pulls": (["wrapper=lookahead", "wrapper.k=0"], "wrapper.k", 0),
    "a pull too far": (["wrapper=lookahead", "wrapper.alpha=5"], "wrapper.alpha", 5),
    "no epochs between averages": (["wrapper=swa", "wrapper.every=0"], "wrapper.every", 0),
    "a target that is no metric": (["targets={val_los:1}"], "targets", "val_los", "val_loss"),
    "a target that is no number": (["targets={val_loss:low}"], "targets.val_loss", "low"),
    "an objective that is no metric": (["objective=accuracy"], "objective", "accuracy", "val_top1_error"),
    "a target that is no metric, by its key": (["targets.val_los=1"], "targets", "val_los", "val_loss"),
    "an empty path": (["data.path="], "data.path", ""),
    "an override without a value": (["rerun"], "rerun", None),
    "a name that is a path": (["optim.name=../../x"], "optim.name", "../../x"),
    "a name of 300 characters": ([f"data.name={'x' * 300}"], "data.name", "x" * 300),
    "a grammar of its own": (["epochs=[1"], "epochs", "[1"),
    "an interpolation of nothing": (["epochs=${nothing}"], "nothing", None),
    "an interpolation of itself": (["epochs=${epochs}"], "epochs", None),
    "a language model on images": (["model=tiny-lstm"], "model", "tiny-lstm"),
    "an image model on text": (["data=pydocs", "model=resnet18"], "model", "resnet18"),
    "a model that does not fit": (["model.width=-4"], "model.width", -4),
    "fewer samples than ranks": (["batch_size=2", "accumulation=4"], "batch_size", 2),
    "no validation set to select on": (["data.validation=0", "select=best-val"], "select", "best-val"),
    "no validation set for the schedule": (["data.validation=0", "schedule=plateau"], "schedule", "plateau"),
    "a validation set that a GAN does not look at": (["model=dcgan", "select=best-val"], "select", "best-val"),
    "a pull on what averages itself": (["optim=schedule-free-sgd", "wrapper=lookahead"], "wrapper", "lookahead"),
    "an average of what averages itself": (["optim=schedule-free-adamw", "wrapper=swa"], "wrapper", "swa"),
    "averages of shards": (["wrapper=swa", "strategy=fsdp", "ranks=2"], "strategy", "fsdp"),
    "text in pieces": (["data=pydocs", "model=tiny-lstm", "accumulation=2"], "accumulation", 2),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(case):
    overrides, key, value, *offered = case
    with refused(key) as caught:
        compose(["data=digits", *overrides])
    assert caught.value.value == value or value is NAN and math.isnan(caught.value.value)
    assert set(offered) <= set(caught.value.valid)


def test_what_a_constructor_refuses_is_named_with_what_it_was_given():
    with refused("optim", "adam", mentions="betas=[0.9, 1.0]"):
        compose(["data=digits", "optim=adam", "optim.betas=[0.9,1]"])


@pytest.mark.parametrize(
    "environment, key, value",
    [
        ({"SLURM_NTASKS": ""}, "SLURM_NTASKS", ""),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK", "x"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, "SLURM_LOCALID", None),
    ],
)
def test_a_launcher_variable_that_is_no_number_is_named(monkeypatch, environment, key, value):
    for name in "RANK WORLD_SIZE LOCAL_RANK SLURM_STEP_NUM_TASKS SLURM_STEP_ID SLURM_PROCID SLURM_LOCALID".split():
        monkeypatch.delenv(name, raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    with refused(key, value):
        compose(["data=digits"])


AT_START = {
    "a batch larger than the set": ("batch_size", 5000),
    "more GPUs than there are": ("num_gpus", 8),
    "several nodes from one process": ("num_nodes", 2),
    "another number of ranks, and nothing to resume": ("ranks", 2),
}


@pytest.mark.parametrize("key, value", AT_START.values(), ids=AT_START.keys())
def test_what_only_the_start_can_know_is_named_and_leaves_no_record(tmp_path, key, value):
    small = ["data=digits", "model=mlp", "logger=none", "num_gpus=0", f"output_root={tmp_path / 'outputs'}"]
    cfg = compose([*small, f"data_root={tmp_path / 'data'}", f"{key}={value}"])
    with refused(key, value):
        launch(cfg)
    assert not list(tmp_path.rglob("record.json")) and not list(tmp_path.rglob("metrics.jsonl"))


def test_a_data_set_brings_its_model_and_schedule_unless_told_otherwise():
    cfg = compose(["data=pydocs"])
    assert (cfg.model.name, cfg.schedule.name) == ("tiny-lstm", "plateau")
    cfg = compose(["data=pydocs", "model=tiny-transformer", "schedule=cosine"])
    assert (cfg.model.name, cfg.schedule.name) == ("tiny-transformer", "cosine")


def test_the_constructor_says_what_an_optimizer_takes():
    cfg = compose(["optim=sgd", "optim.nesterov=true", "optim.lr=20", "optim.dampening=0"])
    assert cfg.optim.nesterov is True and cfg.optim.maximize is False  # one asked for, one filled in
    assert OmegaConf.to_container(cfg.optim)["lr"] == 20.0 and type(cfg.optim.lr) is float


def test_a_class_of_ones_own_is_trained_by_its_path():
    cfg = compose(["optim=sgd", "optim._target_=torch.optim.NAdam", "optim.name=nadam", "~optim.momentum"])
    assert cfg.optim.momentum_decay == 4e-3


def test_numbers_that_come_as_text_are_refused_not_guessed():
    with refused("epochs", "3"):
        compose(["epochs='3'"])


def test_others_files_read_nothing_from_outside(monkeypatch):
    monkeypatch.setenv("HARMLESS", "home")
    for value in ("${oc.env:HARMLESS}", "x-${oc.env:HARMLESS,none}", "${now:%Y}"):
        with refused("logger.project", value):
            compose([f"logger.project='{value}'"])


@pytest.mark.parametrize("key", ["logger.project", "output_root", "optim.name", "logger.tags.0"])
def test_the_value_of_a_secret_goes_nowhere(monkeypatch, key):
    monkeypatch.setenv("MY_API_KEY", "0123456789abcdef")
    override = "logger.tags=[x0123456789abcdef]" if key == "logger.tags.0" else f"{key}=x0123456789abcdef"
    with refused(key, None, mentions="MY_API_KEY") as caught:
        compose([override])
    assert "0123456789abcdef" not in str(caught.value)


def test_run_folders_of_what_is_composed_exist_only_after_launch(tmp_path):
    run_dir(compose(["data=digits", f"output_root={tmp_path}/outputs"]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=digits", "model=mlp", "optim=sgd", "optim.lr=0.1", "optim.nesterov=true", "num_gpus=0"],
        ["data=ptb", "++data.bptt=7", "targets={test_ppl: 80}", "output_root='a,b'", "schedule=cosine", "wrapper=swa"],
        ["optim=adamw", "optim.betas=[0.8,0.9]", "+optim.foreach=true", "data_root=${output_root}"],
    ],
)
def test_values_set_on_composed_choices_are_what_hydra_makes_of_all(overrides):
    cfg = hydra_config(overrides)
    cfg.epochs = 7
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        full = hydra.compose("train", readable(overrides))
    assert hydra_config(overrides) == full and cfg != full
