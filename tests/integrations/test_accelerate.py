"""accelerate: accumulation, a skipped step, evaluation in between, saving and resuming."""

import copy

import pytest
import torch
from torch import nn

from .problem import (
    ACCUMULATED,
    Images,
    assert_agree,
    assert_same_bits,
    fp16_scaler,
    optimizer_for,
    snippets,
    trained_plainly,
)

accelerate = pytest.importorskip("accelerate")
PAGE = snippets("accelerate")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 4, stride=4), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


@pytest.mark.parametrize(("name", "accumulate"), ACCUMULATED)
def test_accumulation(name, accumulate, model):
    truth = trained_plainly(model, name)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    PAGE["train_with_accelerate"](accelerator, model, Images().loader(accumulate), optimizer_for(model, name))
    assert_agree(model, truth)


def test_step_skipped_by_a_scaler(model, monkeypatch):
    truth = trained_plainly(model, "koala-m", batches=[0, 1, 3, 4], autocast=torch.float16)
    accelerator = accelerate.Accelerator(cpu=True)
    scaler = fp16_scaler(accelerator, monkeypatch)
    optimizer = optimizer_for(model, "koala-m")
    PAGE["train_with_accelerate"](accelerator, model, Images(spoiled=(2,)).loader(), optimizer)
    assert scaler.get_scale() == 32.0
    assert_agree(model, truth, 2e-3)


@pytest.mark.parametrize("name", ["koala-m", "koala++"])
def test_resume_ends_with_the_same_bits(name, model, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)

    def train(network, optimizer, times):
        for _ in range(times):
            PAGE["train_with_accelerate"](accelerator, network, Images().loader(), optimizer)
        return optimizer

    fresh = copy.deepcopy(model)
    full = optimizer_for(model, name)
    train(model, full, 1)
    accelerator.save_state(tmp_path)
    accelerator.free_memory()
    train(model, full, 1)
    accelerator.free_memory()
    resumed = optimizer_for(fresh, name)
    accelerator.prepare(fresh, resumed)
    accelerator.load_state(tmp_path)
    train(fresh, resumed, 1)
    assert_same_bits(fresh.state_dict(), model.state_dict())
    assert_same_bits(resumed.state_dict(), full.state_dict())
