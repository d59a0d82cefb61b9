"""One run means one thing: what changes the numbers changes its name, and what does not, does not."""

import pytest

from koala import fingerprint, numerics
from koala.errors import ConfigError
from koala.records import read_history
from koala.runs import compose, launch, run_dir
from tests.refused import assert_names

DIGITS = ["data=digits", "num_gpus=0"]


def folder(*overrides: str):
    return run_dir(compose([*DIGITS, *overrides]))


MATERIAL = [
    *"epochs=7 optim.lr=0.5 batch_size=48 accumulation=2 precision=bf16 sync_bn=true".split(),
    *"model.width=32 model.init=orthogonal wrapper=swa max_steps=3 grad_clip=1.0 schedule=cosine".split(),
    *"schedule.milestones=[1,2] data.validation=100 data.crop_padding=2 cpu_procs=2 ranks=2".split(),
]


@pytest.mark.parametrize("override", MATERIAL)
def test_what_changes_the_numbers_changes_the_run(override):
    assert folder(override) != folder()


IMMATERIAL = [
    *"data_root=elsewhere logger=none targets={val_loss:1.0} objective=train_loss eval_batch_size=7".split(),
    *"data.eval_batch_size=7 ranks=1 checkpoint_every=0 checkpoint_async=true log_every=1 compile=true".split(),
    *"channels_last=false deterministic=true resume=false timeout=5 max_restarts=2 data.epochs=25".split(),
    *"optim.lr=1 optim.weight_decay=5e-4 schedule.milestones=[15,20,23]".split(),  # as it is for 25 epochs
    "cpu_procs=2 ranks=1",
    "epochs=25 data.epochs=7",  # the data set's advice is no part of it when it is not taken
]


@pytest.mark.parametrize("overrides", IMMATERIAL)
def test_what_does_not_change_the_numbers_does_not_change_the_run(overrides):
    assert folder(*overrides.split()) == folder()


def test_an_optimizer_is_its_class_and_arguments_however_they_are_written():
    sgd = folder("optim=sgd")
    assert folder("optim=sgd", "optim.nesterov=false", "optim.dampening=0", "optim.fused=true") == sgd
    assert folder("optim=sgd", "optim.nesterov=true") != sgd
    assert folder("optim=sgd", "optim._target_=torch.optim.RMSprop") != sgd
    assert folder("optim=sgd", "optim.lr=20") == folder("optim=sgd", "optim.lr=20.0") != sgd


def test_seeds_of_a_run_lie_side_by_side():
    first, second = folder("seed=1"), folder("seed=2")
    assert first.parent == second.parent and (first.name, second.name) == ("seed1", "seed2")


def test_a_record_of_another_numerics_version_answers_and_says_so(tmp_path, monkeypatch, capsys):
    cfg = compose([*DIGITS, "model=mlp", "logger=none", "max_steps=1", f"output_root={tmp_path}/out"])
    record = launch(cfg)
    assert record["segments"][0]["numerics"] == numerics.VERSION
    capsys.readouterr()
    assert launch(cfg) == record and not capsys.readouterr().err
    monkeypatch.setattr(numerics, "VERSION", numerics.VERSION + 1)
    assert launch(cfg) == record
    printed = capsys.readouterr().err
    assert_names(printed, "digits/mlp/koala-m", "numerics", numerics.VERSION - 1, "rerun=true")
    assert "torch" not in printed


def test_a_record_of_other_versions_answers_and_says_so(tmp_path, monkeypatch, capsys):
    cfg = compose([*DIGITS, "model=mlp", "logger=none", "max_steps=1", f"output_root={tmp_path}/out"])
    record = launch(cfg)
    here = fingerprint.versions()
    capsys.readouterr()
    monkeypatch.setattr(fingerprint, "versions", lambda: here | {"torch": here["torch"].split("+")[0] + "+other"})
    assert launch(cfg) == record and not capsys.readouterr().err  # a build, which the device says
    monkeypatch.setattr(fingerprint, "versions", lambda: here | {"torch": "99.0", "timm": "99.1"})
    assert launch(cfg) == record
    printed = capsys.readouterr().err
    assert_names(printed, "timm", here["timm"], "torch", here["torch"].split("+")[0], "rerun=true")
    assert "numpy" not in printed and "numerics" not in printed


def test_a_record_answers_for_targets_that_it_was_not_asked_for(tmp_path):
    common = [*DIGITS, "model=mlp", "logger=none", "epochs=3", "optim=adam", f"output_root={tmp_path}/out"]
    without = launch(compose(common))
    rows = read_history(run_dir(compose(common)))
    record = launch(compose([*common, f"targets={{train_loss:{rows[1]['train_loss']}}}"]))
    assert record == without | {"targets": record["targets"]}
    assert record["targets"]["train_loss"]["step"] == rows[1]["step"]


def test_a_record_answers_for_other_values_of_its_targets(tmp_path):
    common = [*DIGITS, "model=mlp", "logger=none", "epochs=2", "optim=adam", f"output_root={tmp_path}/out"]
    assert launch(compose([*common, "targets={train_loss:0.0}"]))["targets"] == {"train_loss": None}
    reached = launch(compose([*common, "targets={train_loss:1e3}"]))["targets"]["train_loss"]
    assert (reached["target"], reached["epoch"]) == (1e3, 1.0)


def test_other_data_is_another_run(tmp_path):
    for name, text in (("one", "a b c d\n" * 50), ("two", "a b d c\n" * 50)):
        (tmp_path / name).mkdir()
        for split in ("train", "valid", "test"):
            (tmp_path / name / f"{split}.txt").write_text(text)
    (tmp_path / "one").rename(tmp_path / "moved")
    common = ["data=ptb", "num_gpus=0", f"data_root={tmp_path}/data"]
    first = run_dir(compose([*common, f"data.path={tmp_path}/moved"]))
    (tmp_path / "moved").rename(tmp_path / "again")
    assert run_dir(compose([*common, f"data.path={tmp_path}/again"])) == first
    assert run_dir(compose([*common, f"data.path={tmp_path}/two"])) != first
    assert run_dir(compose(common)) != first  # the hub's


@pytest.mark.parametrize("content", ["", "{torn", "[]", '{"schema": 1, "status": "finished"}'])
def test_what_is_no_record_is_one_refusal_that_says_how_to_go_on(tmp_path, content):
    cfg = compose([*DIGITS, "model=mlp", "logger=none", "max_steps=1", f"output_root={tmp_path}/out"])
    run_dir(cfg).mkdir(parents=True)
    (run_dir(cfg) / "record.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        launch(cfg)
    assert caught.value.key.startswith(f"{run_dir(cfg)}/record.json") and "rerun=true" in caught.value.reason
    cfg.rerun = True
    assert launch(cfg)["status"] == "finished"
    assert (next(run_dir(cfg).parent.glob("seed1.*")) / "record.json").read_text() == content


GAN = ["data=digits", "model=dcgan", "data.resize=16", "model.features=inception", "grad_clip=null"]


@pytest.mark.parametrize(
    "key, file, chosen",
    [
        ("model.pretrained", "model.safetensors", ["data=pydocs", "model=gpt1-released"]),  # a folder
        ("model.weights", "", GAN),  # a file: what FID is measured with
    ],
)
def test_local_weights_count_by_their_content_wherever_they_lie(tmp_path, key, file, chosen):
    def run(name: str, content: bytes):
        path = tmp_path / name / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return folder(*chosen, f"{key}={tmp_path / name}", f"data_root={tmp_path / 'data'}")

    first = run("one", b"first")
    assert run("one", b"other") != first == run("two", b"first")
