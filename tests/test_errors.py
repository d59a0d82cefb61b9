"""The one error of bad input: what it says, and that it keeps its parts on the way from another process."""

import pickle

import pytest

from koala.cluster import NoAnswer
from koala.errors import LONGEST, ConfigError


@pytest.mark.parametrize(
    "error, text",
    [
        (ConfigError("optim.lr", -1, "too low", valid="0 or more"), "optim.lr=-1: too low; valid: 0 or more"),
        (
            ConfigError("epoch", None, "unknown key", valid=["seed", "epochs"]),
            "epoch: unknown key; did you mean epochs? valid: epochs, seed",
        ),
        (
            ConfigError("model.widht", None, "unknown key", valid=["width"]),
            "model.widht: unknown key; did you mean width? valid: width",
        ),
        (
            ConfigError("optim", "sgdd", "unknown", valid=("sgd", "adam")),
            "optim=sgdd: unknown; did you mean sgd? valid: adam, sgd",
        ),
        (ConfigError("epochs", "3", "no number"), "epochs='3': no number"),
        (ConfigError("compile", True, "no"), "compile=true: no"),
        (ConfigError("output_root", "out ", "no"), "output_root='out ': no"),
        (ConfigError("name", "x" * 500, "long"), f"name={'x' * LONGEST}...: long"),
        (ConfigError("", None, "broken"), "broken"),
    ],
)
def test_its_text(error, text):
    assert str(error) == text


@pytest.mark.parametrize("kind", [ConfigError, NoAnswer])
@pytest.mark.parametrize("valid", ["a phrase", ("one", "two"), ()])
def test_it_arrives_whole_from_another_process(kind, valid):
    error = kind("key", [1.0], "reason", valid=valid)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and str(copy) == str(error)
    assert (copy.key, copy.value, copy.reason, copy.valid) == (error.key, error.value, error.reason, error.valid)
