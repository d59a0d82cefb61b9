"""Modes that surround a call and change what torch makes: inference mode, default devices and dtypes."""

import contextlib
import copy

import pytest
import torch

from .cases import NAMES, assert_same, make, net, snapshot, train


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


MODES = {
    "inference": torch.inference_mode,
    "meta device": lambda: torch.device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}
TOUCHES = {
    "nothing": lambda optimizer: None,
    "backend": lambda optimizer: optimizer.backend,
    "predict": lambda optimizer: optimizer.predict(),
    "update": lambda optimizer: optimizer.update(1.0, 2.0),
    "load": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "load a copy": lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "diagnostics": lambda optimizer: optimizer.diagnostics(),
    "a group": lambda optimizer: optimizer.add_param_group({"params": []}),
}


def trained(name, fused, mode, touch, moment):
    """State after four steps, at one moment of which the optimizer was touched within a mode: 0, when it was made."""
    model = net()
    for step in range(4):
        with mode() if step == moment else contextlib.nullcontext():
            if step == 0:
                optimizer = make(name, model, lr=0.1, weight_decay=0.01, fused=fused)
            if step == moment:
                TOUCHES[touch](optimizer)
        train(model, optimizer, 1, first=step)
    return snapshot(model, optimizer)


@pytest.mark.extended
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_touch_within_a_mode_changes_no_step(name, mode, touch, fused):
    for moment in (0, 2):
        seen, truth = (trained(name, fused, around, touch, moment) for around in (MODES[mode], contextlib.nullcontext))
        assert_same(seen, truth, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["meta device", "bfloat16"])
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
