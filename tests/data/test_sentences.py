"""Sets of sentences: tokens are those of transformers' own tokenizer, each sentence once, known by content."""

import shutil

import pyarrow as pa
import pytest
import torch
import transformers
import yaml
from pyarrow import parquet

from koala.data import Loading, build, fingerprint
from tests.data.sentence_sets import sentence, write_model, write_set
from tests.refused import refused


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a small RoBERTa and its tokenizer."""
    return write_model(tmp_path_factory.mktemp("roberta") / "model")


@pytest.fixture
def cfg(root, model, tmp_path):
    """data=sst2, of local files."""
    cfg = yaml.safe_load((root / "configs/data/sst2.yaml").read_text())
    return cfg | {"path": str(write_set(tmp_path / "sst2")), "tokenizer": str(model), "length": 24}


@pytest.fixture
def load(tmp_path):
    return lambda cfg, batch_size=8: build(cfg, Loading(1, batch_size, 4, data_root=tmp_path / "data"))


def rows(source):
    """{tokens without padding: label}"""
    return {tuple(row[row >= 0].tolist()): label for batch in source
            for row, label in zip(batch.inputs, batch.targets.tolist(), strict=True)}  # fmt: skip


def truth(model, *numbers, label=lambda number: number % 2):
    """As ``rows``, by transformers and sentence for sentence."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return {tuple(tokenizer(sentence(number))["input_ids"]): label(number) for number in numbers}


def test_every_sentence_once_with_the_tokens_and_marks_of_its_tokenizer(cfg, load, model):
    data = load(cfg)
    assert (data.kind, data.num_classes, data.input_shape) == ("sentences", 2, (24,))
    assert rows(data.train.epoch(0)) == rows(data.train.epoch(1)) == truth(model, *range(40))
    assert rows(data.evaluation["test"]) == truth(model, *range(1000, 1011))  # GLUE's validation split
    assert "val" not in data.evaluation
    assert data.vocabulary == 1 + max(token for row in truth(model, *range(40), *range(1000, 1011)) for token in row)
    for batch in data.train.epoch(0):
        assert batch.inputs.dtype == torch.int64 and batch.inputs.shape == (8, 24)
        assert ((batch.inputs >= 0).long().diff() <= 0).all()  # padding stands behind


def test_validation_is_carved_from_training_and_stratified(cfg, load, model):
    data = load(cfg | {"validation": 10}, batch_size=5)
    held_out, trained = rows(data.evaluation["val"]), rows(data.train.epoch(0))
    assert held_out | trained == truth(model, *range(40)) and not held_out.keys() & trained.keys()
    assert sorted(held_out.values()) == [0] * 5 + [1] * 5


def test_pairs_are_told_apart_by_the_marks_between_them(root, load, model, tmp_path):
    cfg = yaml.safe_load((root / "configs/data/mrpc.yaml").read_text())
    cfg |= {"path": str(write_set(tmp_path / "mrpc", pairs=True)), "tokenizer": str(model), "length": 60}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    pairs = [(sentence(number), sentence(1010 - (number - 1000))) for number in range(1000, 1011)]
    expected = {tuple(tokenizer(*pair)["input_ids"]): number % 2 for number, pair in enumerate(pairs, 1000)}
    assert rows(load(cfg).evaluation["test"]) == expected


def test_a_long_sentence_is_cut_before_its_last_mark(cfg, load, model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for row in rows(load(cfg | {"length": 6}).train.epoch(0)):
        assert len(row) <= 6 and (row[0], row[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_a_copy_of_the_hub_has_several_sets(cfg, load, model, tmp_path):
    glue = tmp_path / "glue"
    shutil.move(cfg["path"], glue / "sst2")
    write_set(glue / "cola", train=16)
    configs = [{"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*"}
               for split in ("train", "validation", "test")]} for name in ("sst2", "cola")]  # fmt: skip
    (glue / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    both = [cfg | {"path": None, "hub": str(glue), "hub_config": name} for name in ("sst2", "cola")]
    assert [len(rows(load(one).train.epoch(0))) for one in both] == [40, 16]
    assert fingerprint(both[0], tmp_path / "data") != fingerprint(both[1], tmp_path / "data")


def test_a_set_is_known_by_its_content_and_that_of_its_tokenizer_wherever_they_lie(cfg, model, tmp_path):
    first = fingerprint(cfg, tmp_path / "data")
    shutil.copytree(cfg["path"], tmp_path / "moved")
    shutil.copytree(model, tmp_path / "tokenizer")
    moved = cfg | {"path": str(tmp_path / "moved"), "tokenizer": str(tmp_path / "tokenizer")}
    assert fingerprint(moved, tmp_path / "data") == first
    (tmp_path / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    assert fingerprint(moved, tmp_path / "data") != first
    write_set(tmp_path / "other", train=41)
    assert fingerprint(cfg | {"path": str(tmp_path / "other")}, tmp_path / "data") != first


def test_a_folder_with_a_model_alone_has_no_tokenizer(cfg, load, model, tmp_path):
    (tmp_path / "weights").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, tmp_path / "weights")
    for folder in ("weights", "nowhere"):
        with refused("data.tokenizer", str(tmp_path / folder)):
            load(cfg | {"tokenizer": str(tmp_path / folder)})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"train_split": "trains"}, "data.path"),
        ({"text_column": "sentences"}, "data.text_column"),
        ({"text_column": "idx"}, "data.text_column"),
        ({"pair_column": "idx"}, "data.pair_column"),
        ({"label_column": "sentence"}, "data.label_column"),
        ({"test_split": "test"}, "data.classes"),  # without labels
        ({"path": None, "hub": None}, "data.path"),
        ({"path": "/nowhere"}, "data.path"),
        ({"validation": 40}, "data.validation"),
        ({"length": 0}, "data.length"),
    ],
)
def test_what_is_wrong_is_named(cfg, load, change, key):
    with refused(key):
        load(cfg | change)


def test_a_row_without_text_is_refused(cfg, load, tmp_path):
    table = pa.table({"sentence": pa.array(["good", None]), "label": pa.array([1, 0])})
    parquet.write_table(table, tmp_path / "sst2/train-00000-of-00001.parquet")
    with refused("data.text_column", "sentence"):
        load(cfg, batch_size=1)
