"""Small sets of sentences for tests, made with pyarrow alone, and a RoBERTa of transformers that fits them."""

from pathlib import Path

import pyarrow as pa
import torch
import transformers
from pyarrow import parquet
from tokenizers import ByteLevelBPETokenizer

WORDS = "a bad film it was good and long but very dull or funny not at all".split()


def sentence(number: int, most: int = 12) -> str:
    """Up to ``most`` words, drawn by ``number``; one that is odd is good."""
    draw = torch.Generator().manual_seed(number)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (1 + number % most,), generator=draw)]
    return " ".join([*words, "good" if number % 2 else "bad"])


def write_set(folder: Path, pairs: bool = False, train: int = 40, validation: int = 11) -> Path:
    """GLUE's files: sentences are labelled by whether their number is odd; those of its test split are not (-1)."""
    splits = {"train": range(train), "validation": range(1000, 1000 + validation), "test": range(2000, 2003)}
    folder.mkdir(parents=True)
    for split, numbers in splits.items():
        first = [sentence(number) for number in numbers]
        text = {"sentence1": first, "sentence2": first[::-1]} if pairs else {"sentence": first}
        labels = [-1 if split == "test" else number % 2 for number in numbers]
        table = pa.table({**text, "label": pa.array(labels, pa.int64()), "idx": pa.array(list(numbers), pa.int32())})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_model(folder: Path, classes: int = 2) -> Path:
    """What save_pretrained leaves of a small RoBERTa and of a tokenizer that was trained on the sentences."""
    folder.mkdir(parents=True)
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(map(sentence, range(200)), vocab_size=300, special_tokens=marks, show_progress=False)
    trained.save_model(str(folder))
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    transformers.RobertaTokenizer(**files).save_pretrained(folder)
    config = transformers.RobertaConfig(
        vocab_size=300, max_position_embeddings=34, type_vocab_size=1, layer_norm_eps=1e-5, num_labels=classes,
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.RobertaForSequenceClassification(config).save_pretrained(folder)
    return folder
