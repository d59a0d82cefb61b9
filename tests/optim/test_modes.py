"""Modes that surround a call and change what torch makes: default devices and dtypes."""

import contextlib

import pytest
import torch

from .cases import NAMES, assert_same, make, net, snapshot


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


MODES = {
    "meta device": lambda: torch.device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_steps_within_a_mode(name, mode, fused):
    """By losses that are numbers: nothing of a step asks for the default device or dtype."""
    finals = []
    for around in (MODES[mode], contextlib.nullcontext):
        model = net()
        gradients = [torch.sin(p.detach()) for p in model.parameters()]
        with around():
            optimizer = make(name, model, lr=0.1, weight_decay=0.01, fused=fused)
            for _ in range(3):
                optimizer.predict()
                for p, gradient in zip(model.parameters(), gradients, strict=True):
                    p.grad = gradient if p.requires_grad else None
                optimizer.step(loss=1.5, loss_var=3.0)
            optimizer.step(lambda: 1.5)
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step(loss=1.0)
        finals.append(snapshot(model, optimizer))
    assert_same(*finals, rtol=0, atol=0)
