"""RoBERTa on sentences: transformers' own outputs, adapted by factors, online and in epochs; or refused."""

import shutil

import pytest
import torch
import transformers

from koala.models import build, untrained
from koala.runs import compose
from tests.data.sentence_sets import sentence, write_model, write_set
from tests.refused import refused

pytest.importorskip("peft")

SIZES = {"layers": 2, "width": 16, "heads": 2, "feedforward": 32, "context": 32, "vocabulary": 300}
BASE = {"name": "small", "kind": "text-classification", "family": "roberta", "dropout": 0.0, **SIZES}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small RoBERTa and its tokenizer."""
    return write_model(tmp_path_factory.mktemp("roberta") / "model")


@pytest.fixture
def sst2(model, tmp_path):
    """Overrides: the stream of data=sst2 for that RoBERTa with factors."""
    folder = write_set(tmp_path / "sst2")
    sizes = [f"model.base.{key}={value}" for key, value in SIZES.items()]
    return ["data=sst2", "model=roberta-base-lora", *sizes, f"model.base.pretrained={model}", f"data.path={folder}",
            f"data.tokenizer={model}", "data.length=32", "data.validation=8", "epochs=1", "batch_size=1"]  # fmt: skip


def built(classes=2, **keys):
    return build(BASE | keys, kind="sentences", num_classes=classes, input_shape=(32,)).eval()


@pytest.mark.parametrize("adapted", [False, True])
def test_logits_are_those_of_transformers_for_each_sentence_alone(model, adapted):
    theirs = transformers.RobertaForSequenceClassification.from_pretrained(model).eval()
    tokenizer, texts = transformers.AutoTokenizer.from_pretrained(model), [sentence(number) for number in range(9)]
    with torch.no_grad():
        truth = torch.cat([theirs(**tokenizer(text, return_tensors="pt")).logits for text in texts])
        tokens = torch.full((9, 32), -1)
        for row, ids in zip(tokens, tokenizer(texts)["input_ids"], strict=True):
            row[: len(ids)] = torch.tensor(ids)
        base = BASE | {"pretrained": str(model)}
        lora = {"name": "lora", "kind": BASE["kind"], "family": "lora", "base": base, "targets": ["query", "value"]}
        ours = build(lora if adapted else base, kind="sentences", num_classes=2, input_shape=(32,)).eval()
        assert truth.std() > 0.1  # or else anything is close
        torch.testing.assert_close(ours(tokens), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "weights"), [("base", 124_647_170), ("large", 355_361_794)])
def test_weights_are_as_many_as_those_of_the_hubs_model_with_two_classes(name, weights):
    cfg = compose([f"model=roberta-{name}", "data=sst2", "num_gpus=0", "logger=none"])
    with torch.device("meta"):
        network = build(untrained(cfg.model), kind="sentences", num_classes=2, input_shape=(128,))
    assert sum(weight.numel() for weight in network.parameters()) == weights


@pytest.mark.parametrize("optim", ["loko", "adamw"])
def test_factors_and_classifier_move_and_nothing_else(runs, sst2, model, optim):
    run = [*sst2, f"optim={optim}"]
    record = runs.launch(*run)
    assert record["status"] == "finished" and record["steps"] == 32
    (row,) = runs.history(*run)
    assert 0 < row["train_top1_error"] < 100 and row.keys() >= {"val_top1_error", "test_top1_error"}
    before = transformers.RobertaForSequenceClassification.from_pretrained(model).state_dict()
    after = {name.removeprefix("network."): value for name, value in runs.weights(*run).items()}
    factors = {name: after.pop(name) for name in list(after) if "lora_" in name}
    moved = {name for name, value in after.items() if not torch.equal(value, before[name.replace(".base_layer", "")])}
    assert len(after) == len(before) and moved == {name for name in before if name.startswith("classifier.")}
    assert len(factors) == 8 and all(value.any() for value in factors.values())
    assert {name.split(".")[-4] for name in factors} == {"query", "value"}


def test_it_learns_what_a_last_word_says(runs, sst2, tmp_path):
    shutil.rmtree(tmp_path / "sst2")
    write_set(tmp_path / "sst2", train=400)
    run = [*sst2, "optim=adamw", "optim.lr=0.01", "batch_size=8", "epochs=8", "schedule=constant"]
    runs.launch(*run)
    first, *_, last = runs.history(*run)
    assert last["train_loss"] < 0.75 * first["train_loss"] and last["train_top1_error"] < 30


def test_a_run_is_known_by_the_content_of_model_and_tokenizer(runs, sst2, model, tmp_path):
    def folder(path):
        return runs.folder(*sst2, "optim=adamw", f"model.base.pretrained={path}", f"data.tokenizer={path}")

    shutil.copytree(model, tmp_path / "moved")
    assert folder(tmp_path / "moved") == folder(model)
    (tmp_path / "moved/merges.txt").write_text("#version: 0.2\n")
    assert runs.folder(*sst2, "optim=adamw", f"data.tokenizer={tmp_path}/moved") != runs.folder(*sst2, "optim=adamw")


def test_a_classifier_of_other_classes_is_drawn(model):
    torch.manual_seed(1)
    ours, theirs = built(5, pretrained=str(model)), built(2, pretrained=str(model))
    assert torch.equal(ours.classifier.dense.weight, theirs.classifier.dense.weight)
    assert ours.classifier.out_proj.weight.shape == (5, 16)


@pytest.mark.parametrize("change", ["width", "layers", "context", "vocabulary"])
def test_weights_of_other_sizes_are_refused(model, change):
    with refused("model.pretrained", str(model)):
        built(pretrained=str(model), **{change: 2 * SIZES[change]})


def test_weights_that_may_hold_code_or_are_of_another_network_are_refused(model, tmp_path):
    network = transformers.RobertaForSequenceClassification.from_pretrained(model)
    network.config.save_pretrained(tmp_path / "pickled")
    torch.save(network.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    config = transformers.BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=34)  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    for folder in ("pickled", "bert", "nowhere"):
        with refused("model.pretrained", str(tmp_path / folder)):
            built(pretrained=str(tmp_path / folder))


def test_what_does_not_fit_is_refused(runs, sst2, model):
    with refused("model.base.vocabulary", 200):
        runs.launch(*sst2, "optim=adamw", "model.base.vocabulary=200", "model.base.pretrained=null")
    with refused("data.length", 40):
        runs.compose(*sst2, "data.length=40")
    with refused("model.base.heads", 3):
        runs.compose(*sst2, "model.base.heads=3")
    with refused("model.targets"):
        runs.compose(*sst2, "model.targets=[qkv]")
    with refused("model"):
        runs.compose("data=sst2", "model=resnet18")
    with refused("model"):
        runs.compose("data=digits", "model=roberta-base-lora")
    with refused("model.base.kind"):
        runs.compose(*sst2, "model.base.kind=vision")


@pytest.mark.parametrize("data", ["sst2", "cola", "mrpc"])
@pytest.mark.parametrize("model", ["roberta-base", "roberta-base-lora", "roberta-large-lora"])
def test_the_sets_compose_with_the_models_by_their_names_alone(data, model):
    cfg = compose([f"data={data}", f"model={model}", "num_gpus=0", "logger=none"])
    assert cfg.data.hub_config == data and cfg.data.test_split == "validation"
