"""The keys of a data set's config (configs/data/*.yaml); the others in these files (epochs, ...) are the trainer's."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from koala.errors import ConfigError
from koala.schema import Schema, Word, check

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Spec(Schema):
    """What every data set has. With neither ``path`` nor ``hub`` it is the embedded one of its kind."""

    model_config = ConfigDict(extra="ignore")  # the trainer's keys, which stand in the same files

    name: Word
    kind: str
    path: str | None = Field(None, min_length=1)  # a local folder
    # Id of a data set on the Hugging Face hub, or a local copy of its repository
    hub: str | None = Field(None, min_length=1)
    hub_config: str | None = None  # where it has several
    hub_revision: str | None = None  # its commit, so that everybody has the same data


class LabelledSpec(Spec):
    """What every set of samples with classes has; ``sample_columns``: keys of the columns of a sample."""

    sample_columns: ClassVar[tuple[str, ...]]

    classes: Annotated[int, Field(ge=2)]
    label_column: str = "label"
    train_split: str = "train"  # names of the splits; local parquet files begin with them
    test_split: str = "test"
    drop_last: bool = True  # training: leave out an epoch's last incomplete batch
    validation: Count = 0  # samples carved from train, stratified by class, the same ones for every seed

    @property
    def columns(self) -> dict[str, str]:
        """{key of the configuration: name} of the columns of a table that are read."""
        keys = (*self.sample_columns, "label_column")
        return {f"data.{key}": name for key in keys if (name := getattr(self, key))}


class ImageSpec(LabelledSpec):
    """What an image data set is, where it comes from and how its images are prepared.

    ``path`` is a folder of <split>*.parquet files, or of <split>/<class>/ folders of images; embedded are
    scikit-learn's handwritten digits.
    """

    sample_columns = ("image_column",)

    size: Positive  # images are size x size
    channels: Literal[1, 3] = 3  # grey or RGB; images are converted
    mean: list[float] = [0.0]  # of pixel values 0..255, one for each channel
    std: list[Annotated[float, Field(gt=0)]] = [255.0]
    image_column: str = "image"
    resize: Positive | None = None  # once decoded, to this size (bilinear): what the network sees, instead of size
    crop_padding: Count = 0  # training: zero-pad by so many pixels and crop at random
    flip: bool = False  # training: mirror every second image, at random
    cutout: Count = 0  # training: side of a square set to the mean colour (arXiv 1708.04552)
    streaming: bool = False  # decode in workers while training instead of holding uint8 images on the device
    workers: Count | None = None  # processes of each rank that decode, when streaming; null: as many as it has cores

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the network sees."""
        return (self.channels, self.resize or self.size, self.resize or self.size)

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> "ImageSpec":
        for key in ("mean", "std"):
            values = getattr(self, key)
            if len(values) not in (1, self.channels):
                raise ConfigError(key, values, f"needs {self.channels} values, one for each channel")
        return self


class SentenceSpec(LabelledSpec):
    """What a set of sentences, or of pairs of them, is and how it becomes tokens. ``path`` is a folder of
    <split>*.parquet files; no set is embedded."""

    sample_columns = ("text_column", "pair_column")

    text_column: str = "sentence"
    pair_column: str | None = None  # of the second sentences; null: there are none
    tokenizer: str  # that of the model: of transformers, hub id or local folder
    length: Positive = 128  # tokens, those that mark begin and end among them; longer sentences are cut

    @property
    def input_shape(self) -> tuple[int]:
        """Tokens of a sentence with its padding."""
        return (self.length,)

    @model_validator(mode="after")
    def _none_is_embedded(self) -> "SentenceSpec":
        if self.path is None and self.hub is None:
            raise ConfigError("path", "null", "no sentences are embedded", valid="a folder, or an id in data.hub")
        return self


class TextSpec(Spec):
    """What a text data set is and how it is cut into batches. Embedded is Python's documentation.

    As a stream (the default), a batch's columns are read side by side and recurrent state goes from step to step; as
    ``windows``, shuffled stretches of ``bptt`` tokens are contexts of their own.
    """

    text_column: str = "text"
    tokenizer: str | None = (
        None  # null: words; bpe: trained here; or a tokenizer of transformers, hub id or local folder
    )
    vocabulary: Annotated[int, Field(ge=3)] | None = None  # largest number of types; null: all (bpe: 8,000)
    windows: bool = False
    bptt: Positive = 35  # tokens of a column at a step, or of a window
    bptt_random: bool = False  # at each step N(bptt, 5^2) tokens, once in 20 N(bptt / 2, 5^2), at least 5 (AWD-LSTM)
    # Columns that an evaluation stream is cut into: part of the metric's definition. Of windows: how many make a batch
    # of the older perplexity, which counts an incomplete one as full.
    eval_columns: Positive = 10

    @property
    def input_shape(self) -> tuple[int]:
        """Tokens of a context."""
        return (self.bptt,)

    @model_validator(mode="after")
    def _windows_have_one_length(self) -> "TextSpec":
        if self.windows and self.bptt_random:
            raise ConfigError("bptt_random", True, "windows have one length", valid="false, or data.windows=false")
        return self


KINDS = {"images": ImageSpec, "sentences": SentenceSpec, "text": TextSpec}


def spec_of(cfg: Mapping[str, Any]) -> ImageSpec | SentenceSpec | TextSpec:
    """Reads the keys of a data set from ``cfg``, a file of configs/data.

    Raises:
        ConfigError: naming key, value and what is valid.
    """
    kind = str(cfg.get("kind", "null"))
    if kind not in KINDS:
        raise ConfigError("data.kind", kind, "unknown", valid=KINDS)
    return check(KINDS[kind], cfg, "data.")
