"""From experiment files to runs: each once, every cell a valid one, in the papers' setting."""

import pytest
import yaml

from koala.errors import ConfigError
from koala.reproduce.cli import main
from koala.reproduce.plan import Plan, typed
from koala.runs import compose
from koala.tables.cli import EXPERIMENTS
from koala.tables.experiment import Experiment, find_experiments, load_experiment


def plan(*names, profile="smoke", **options):
    return Plan([load_experiment(EXPERIMENTS, name) for name in names], profile, **options)


def test_every_run_once_however_many_tables_it_stands_in():
    found = plan("koala/table2", "koala/table3", "koala/table4", profile="full")
    shared = [sample for sample in found.samples if sample.run.path == found.samples[-4].run.path]
    names = {(sample.spec.name, *sample.key.values()) for sample in shared}
    assert names >= {("koala/table3", "sw-0.1"), ("koala/table3", "sv-0.1"), ("koala/table4", 128)}
    assert len(found.runs) == len({run.path for run in found.runs}) < len(found.samples)


def test_only_some_cells_of_a_table():
    some = [one.key for one in plan("koala/table6", only={"data": ["cifar10"], "epochs": ["100"]}).samples]
    keys = [one.key for one in plan("koala/table6").samples]
    assert some and some == [key for key in keys if (key["data"], key["epochs"]) == ("cifar10", 100)]


def each_value_once(keys: list[dict]) -> list[dict]:
    """Those with a value of some axis that none before them has."""
    seen: set = set()
    return [key for key in keys if key.items() - seen and not seen.update(key.items())]


@pytest.mark.extended
@pytest.mark.parametrize("name", find_experiments(EXPERIMENTS))
@pytest.mark.parametrize("some", [each_value_once, pytest.param(list, marks=pytest.mark.slow)], ids=["values", "all"])
def test_every_smoke_cell_composes(name, some, monkeypatch):
    keys = Experiment.keys
    monkeypatch.setattr(Experiment, "keys", lambda spec: some(keys(spec)))
    found = plan(name)
    cells = {str(key) for key in load_experiment(EXPERIMENTS, name).keys()}
    planned = {str(sample.key) for sample in found.samples}
    assert planned | {str(cell.key) for _, cell in found.blocked} == cells
    assert all(run.cfg.data.name in ("digits", "pydocs", "pydocs-bpe") for run in found.runs)


@pytest.mark.extended
@pytest.mark.parametrize("name", ["koala/table6", "koala++/table1", "koala/supplement_table1"])
def test_full_profiles_compose_in_the_papers_setting(name):
    for sample in plan(name, profile="full").samples:
        cfg = sample.run.cfg
        if name == "koala/table6":
            rate = {"sgd": 0.1, "adam": 3e-4, "koala-m": 1.0}[cfg.optim.name]
            decay = 1e-4 if cfg.data.name == "imagenet32" else 5e-4
            assert (cfg.epochs, cfg.batch_size, cfg.optim.lr) == (sample.key["epochs"], 128, rate)
            assert (cfg.optim.weight_decay, cfg.precision, cfg.select) == (decay, "fp32", "last")
        elif name == "koala++/table1":
            epochs = {"sgd": 226, "adam": 210, "adamw": 210, "adahessian": 89, "kfac": 107, "shampoo": 36}
            small = sample.key["model"] == "swin-tiny" and cfg.optim.name in ("adamw", "adahessian")
            assert (cfg.epochs, cfg.batch_size) == (epochs.get(cfg.optim.name, 200), 128 if small else 256)
            assert (cfg.schedule.name, cfg.schedule.by, cfg.data.cutout) == ("cosine", "epoch", 16)
        else:
            assert (cfg.epochs, cfg.batch_size, cfg.data.bptt, cfg.grad_clip) == (40, 20, 35, 0.25)
            assert (cfg.select, cfg.schedule.name, cfg.schedule.gamma) == ("best-val", "plateau", 0.25)


@pytest.mark.extended
def test_loko_has_the_sets_of_the_paper_on_transformers_one_sample_at_a_time():
    runs = plan("loko", profile="full").runs
    on = {model: {run.cfg.data.name for run in runs if run.cfg.model.name == f"{model}-lora"}
          for model in ("resnet18", "vit-b16", "roberta-base")}  # fmt: skip
    assert on == {
        "resnet18": {"digits", "cifar10"},
        "vit-b16": {"mnist", "cifar10", "cifar100", "imagenet100"},
        "roberta-base": {"sst2", "cola", "mrpc"},
    }
    assert all((run.cfg.epochs, run.cfg.batch_size, run.cfg.data.validation > 0) == (1, 1, True) for run in runs)


def test_fault_in_a_cell_names_file_and_cell():
    with pytest.raises(ConfigError, match=r"table4.yaml: cell \{'batch_size': 32\}.*epochs"):
        plan("koala/table4", extra=["epochs=0"])


def test_paths_may_hold_what_hydra_has_a_meaning_for(capsys, tmp_path):
    for text in ("a,b", "it's (x=1)", "1", "null", "[a]{b}", "back\\"):
        assert compose(["data=digits", "optim=sgd", "num_gpus=0", typed("output_root", text)]).output_root == text
    assert typed("output_root", "/tmp/out put") == "output_root=/tmp/out put"
    assert main(["quickstart", "--profile", "smoke", "--dry-run", "--output", str(tmp_path / "a,b=(c)")]) == 0
    assert "a,b=(c)" in capsys.readouterr().out


def test_sweep_file_makes_valid_commands(root, monkeypatch):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    monkeypatch.setenv("OPTIM", "koala-m")
    sweep = yaml.safe_load((root / "scripts/sweeps/tune.yaml").read_text())
    command = create_sweep_command(sweep["command"])
    drawn = create_sweep_command_args({"args": {"optim.lr": {"value": 3.2e-05}, "seed": {"value": 1}}})
    overrides = [text for text in command if "=" in text] + drawn["args_no_hyphens"]
    cfg = compose(overrides)
    assert (cfg.optim.name, cfg.optim.lr, cfg.data.name) == ("koala-m", 3.2e-05, "digits")
    assert command[:3] == ["${env}", "python", "${program}"] and (root / sweep["program"]).exists()
