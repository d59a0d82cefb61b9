"""Bad input gets one line that names the key, the value and what is valid, before any folder exists."""

import hydra
import pytest
from omegaconf import OmegaConf

from koala.errors import ConfigError
from koala.runs import compose, launch, run_dir
from koala.runs.command_line import typed_later
from koala.runs.compose import CONFIGS, LAUNCHER, hydra_config

BAD = {
    "unknown key": (["foo=1"], ["foo", "batch_size", "epochs"]),
    "added key": (["+bar=1"], ["bar", "valid", "epochs"]),
    "misspelt key": (["epoch=3"], ["did you mean epochs"]),
    "unknown optimizer": (["optim=koala-z"], ["koala-z", "koala-m", "sgd"]),
    "unknown data set": (["data=mnist"], ["mnist", "digits", "cifar100"]),
    "unknown model": (["model=vgg"], ["vgg", "resnet18"]),
    "unknown optimizer key": (["optim.momentum=0.9"], ["optim.momentum", "alpha_r", "lr"]),
    "misspelt argument of a constructor": (["optim=sgd", "optim.nestrov=true"], ["did you mean nesterov"]),
    "misspelt argument of one that swallows any": (["optim=yogi", "optim.epz=1"], ["optim.epz", "did you mean eps"]),
    "unknown data key": (["data.pth=x"], ["data.pth", "did you mean path"]),
    "unknown model key": (["model.widht=8"], ["model.widht", "did you mean width"]),
    "wrong type": (["epochs=abc"], ["epochs", "abc", "integer"]),
    "a number for a truth": (["compile=1"], ["compile=1", "boolean"]),
    "a truth for a number": (["seed=true"], ["seed=True", "integer"]),
    "no number": (["checkpoint_every=nan"], ["checkpoint_every=nan", "finite"]),
    "wrong type in a group": (["optim.lr=fast"], ["optim.lr", "fast", "number"]),
    "no rate": (["optim.lr=null"], ["optim.lr=None", "number"]),
    "no epochs": (["epochs=0"], ["epochs=0", "greater than or equal to 1"]),
    "no batch": (["batch_size=0"], ["batch_size=0", "greater than or equal to 1"]),
    "negative rate": (["optim.lr=-1"], ["lr", "-1"]),
    "negative rate of torch's": (["optim=adam", "optim.lr=-1"], ["adam", "-1"]),
    "too few betas": (["optim=adam", "optim.betas=[]"], ["optim.betas", "missing"]),
    "a beta of 1": (["optim=adam", "optim.betas=[0.9,1]"], ["adam", "beta", "betas=[0.9, 1.0]"]),
    "no optimizer": (["optim=null"], ["optim=null", "koala-m"]),
    "no data": (["data=null"], ["data=null", "digits"]),
    "no model": (["~model"], ["model", "resnet18"]),
    "no class": (["~optim._target_"], ["optim._target_=None", "torch.optim.Optimizer"]),
    "a class that is no optimizer": (["optim._target_=types.SimpleNamespace"], ["SimpleNamespace", "no torch.optim"]),
    "a class that is nowhere": (["optim._target_=nowhere.At"], ["optim._target_=nowhere.At", "imported"]),
    "precision": (["precision=fp8"], ["fp8", "fp32", "bf16"]),
    "strategy": (["strategy=zero"], ["zero", "ddp", "fsdp"]),
    "number of GPUs": (["num_gpus=all"], ["num_gpus='all'", "auto"]),
    "number of ranks": (["ranks=0"], ["ranks=0", "auto"]),
    "selection": (["select=best-test"], ["best-test", "best-val"]),
    "grad_clip": (["grad_clip=-1"], ["grad_clip=-1", "greater than 0"]),
    "milestones that are words": (["schedule.milestones=[a]"], ["schedule.milestones", "'a'", "integer"]),
    "one milestone": (["schedule.milestones=3"], ["schedule.milestones=3", "list"]),
    "no milestones": (["schedule.milestones={}"], ["schedule.milestones", "[30,60,90]"]),
    "negative warm-up": (["schedule=cosine", "schedule.warmup=-3"], ["schedule.warmup=-3", "equal to 0"]),
    "a warm-up without end": (["schedule=cosine", "schedule.warmup=9", "epochs=9"], ["schedule.warmup=9", "epochs=9"]),
    "a rate that rises": (["schedule=plateau", "schedule.gamma=2"], ["schedule.gamma=2", "less than 1"]),
    "no steps between pulls": (["wrapper=lookahead", "wrapper.k=0"], ["wrapper.k=0", "equal to 1"]),
    "a pull too far": (["wrapper=lookahead", "wrapper.alpha=5"], ["wrapper.alpha=5", "equal to 1"]),
    "no epochs between averages": (["wrapper=swa", "wrapper.every=0"], ["wrapper.every=0", "equal to 1"]),
    "a target that is no metric": (["targets={val_los:1}"], ["targets=val_los", "did you mean val_loss"]),
    "a target that is no number": (["targets={val_loss:low}"], ["targets", "low", "number"]),
    "an objective that is no metric": (["objective=accuracy"], ["objective=accuracy", "val_top1_error"]),
    "a name that is a path": (["optim.name=../../x"], ["optim.name='../../x'", "pattern"]),
    "a name of 300 characters": ([f"data.name={'x' * 300}"], ["data.name", "xxx"]),
    "a grammar of its own": (["epochs=[1"], ["epochs='[1'", "integer"]),
    "an interpolation of nothing": (["epochs=${nothing}"], ["nothing"]),
    "an interpolation of itself": (["epochs=${epochs}"], ["epochs"]),
    "a language model on images": (["model=tiny-lstm"], ["tiny-lstm", "text", "images"]),
    "an image model on text": (["data=pydocs", "model=resnet18"], ["resnet18", "images", "text"]),
    "a model that does not fit": (["model.width=-4"], ["width"]),
    "fewer samples than ranks": (["batch_size=2", "accumulation=4"], ["batch_size=2", "4"]),
    "no validation set to select on": (["data.validation=0", "select=best-val"], ["select=best-val", "validation"]),
    "no validation set for the schedule": (["data.validation=0", "schedule=plateau"], ["plateau", "validation"]),
    "a pull on what averages itself": (
        ["optim=schedule-free-sgd", "wrapper=lookahead"],
        ["wrapper=lookahead", "optim=schedule-free-sgd", "wrapper=none"],
    ),
    "an average of what averages itself": (
        ["optim=schedule-free-adamw", "wrapper=swa"],
        ["wrapper=swa", "optim=schedule-free-adamw", "wrapper=none"],
    ),
    "averages of shards": (["wrapper=swa", "strategy=fsdp", "ranks=2"], ["wrapper=swa", "strategy=ddp"]),
    "text in pieces": (["data=pydocs", "model=tiny-lstm", "accumulation=2"], ["accumulation=2", "language"]),
}


@pytest.mark.parametrize("overrides, named", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(overrides, named):
    with pytest.raises(ConfigError) as error:
        compose(["data=digits", *overrides])
    for word in named:
        assert word in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "environment, named",
    [
        ({"SLURM_NTASKS": ""}, "SLURM_NTASKS=''"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, "SLURM_LOCALID is missing"),
    ],
)
def test_a_launcher_variable_that_is_no_number_is_named(monkeypatch, environment, named):
    for name in (*LAUNCHER, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"environment: {named}; .*whole numbers"):
        compose(["data=digits"])


AT_START = {
    "a batch larger than the set": (["batch_size=5000"], ["5000", "1257"]),
    "more GPUs than there are": (["num_gpus=8"], ["num_gpus=8", "this machine has"]),
    "several nodes from one process": (["num_nodes=2"], ["num_nodes=2", "torchrun", "slurm"]),
    "another number of ranks, and nothing to go on with": (["ranks=2"], ["ranks=2", "cpu_procs=2"]),
}


@pytest.mark.parametrize("overrides, named", AT_START.values(), ids=AT_START.keys())
def test_what_only_the_start_can_know_is_named_and_leaves_no_record(tmp_path, overrides, named):
    small = ["data=digits", "model=mlp", "logger=none", "num_gpus=0", f"output_root={tmp_path / 'outputs'}"]
    cfg = compose([*small, f"data_root={tmp_path / 'data'}", *overrides])
    with pytest.raises(ConfigError) as error:
        launch(cfg)
    for word in named:
        assert word in str(error.value)
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
    with pytest.raises(ConfigError, match="epochs='3'"):
        compose(["epochs='3'"])


def test_others_files_read_nothing_from_outside(monkeypatch):
    monkeypatch.setenv("HARMLESS", "home")
    for value in ("${oc.env:HARMLESS}", "x-${oc.env:HARMLESS,none}", "${now:%Y}"):
        with pytest.raises(ConfigError, match=r"logger.project=.*outside of the configuration"):
            compose([f"logger.project='{value}'"])


@pytest.mark.parametrize("key", ["logger.project", "output_root", "optim.name", "logger.tags.0"])
def test_the_value_of_a_secret_goes_nowhere(monkeypatch, key):
    monkeypatch.setenv("MY_API_KEY", "0123456789abcdef")
    override = "logger.tags=[x0123456789abcdef]" if key == "logger.tags.0" else f"{key}=x0123456789abcdef"
    with pytest.raises(ConfigError, match="MY_API_KEY") as error:
        compose([override])
    assert key in str(error.value) and "0123456789abcdef" not in str(error.value)


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
        whole = hydra.compose("train", typed_later(overrides))
    assert hydra_config(overrides) == whole and cfg != whole
