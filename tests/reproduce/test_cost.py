"""What a run is said to cost before it is run."""

import pytest

from koala.reproduce.cost import flops_per_sample, run_flops, total
from koala.runs import compose

MLP = ["data=digits", "model=mlp", "optim=sgd", "num_gpus=1"]


def flops(*overrides: str) -> float | None:
    return run_flops(compose([*MLP, *overrides]))


def test_flops_of_a_linear_model():
    forward = 2 * (64 * 32 + 32 * 10)  # two operations a weight
    backward = 2 * forward - 2 * 64 * 32  # the inputs get no gradient
    per_epoch = 1257 * (forward + backward) + 540 * forward
    assert flops("model.width=32", "model.layers=[1]", "epochs=2") == 2 * per_epoch


def test_every_run_is_evaluated_at_its_end_and_as_often_as_it_asks():
    hidden = ["model.width=32", "model.layers=[1]"]
    forward = 2 * (64 * 32 + 32 * 10)
    both = 3 * forward - 2 * 64 * 32
    cost = lambda *more: flops(*hidden, "batch_size=64", *more)  # noqa: E731
    assert cost("max_steps=1") == pytest.approx(64 * both + 540 * forward)
    assert cost("epochs=3", "eval_every=2") == 3 * 1257 * both + 2 * 540 * forward
    assert cost("optim=lbfgs", "optim.max_iter=5") > 4 * cost()


def test_a_step_of_text_is_its_tokens_and_few_words_cost_less():
    def cost(*more: str) -> float:
        return run_flops(compose(["data=pydocs", "model=tiny-lstm", "optim=sgd", "num_gpus=0", *more]))

    step = cost("max_steps=2") - cost("max_steps=1")
    assert cost("max_steps=2", "data.bptt=70") - cost("max_steps=1", "data.bptt=70") == pytest.approx(
        2 * step, rel=0.01
    )
    assert cost("data.vocabulary=100") < cost("data.vocabulary=1000")


def test_a_model_is_counted_once_however_many_runs_train_it():
    flops_per_sample.cache_clear()
    for seed in (1, 2):
        for optim in ("sgd", "adam"):
            assert flops(f"optim={optim}", f"seed={seed}") > 0
    assert flops_per_sample.cache_info().misses == 1


def test_what_cannot_be_counted_is_unknown_in_the_sum():
    gan = run_flops(compose(["data=cifar10", "model=dcgan", "optim=adam", "num_gpus=0"]))
    assert gan is None and total([1e9, gan, 2e9]) == "3 runs, 3.00e+09 FLOP (1 of unknown size)"
