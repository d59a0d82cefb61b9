"""State goes through files, copies and torch.distributed.checkpoint to the bit."""

import copy
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from .cases import IDS, NAMES, OUTPUT_IDS, OUTPUTS, VARIANTS, assert_same, make, net, snapshot, train


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("name", "hyper"), VARIANTS + OUTPUTS, ids=IDS + OUTPUT_IDS)
@pytest.mark.parametrize("way", ["file", "memory", "between predict and update", "deepcopy", "pickle"])
def test_continues_bit_identically(name, hyper, way):
    """The two go on one after the other: neither moves what the other has."""
    model = net()
    optimizer = make(name, model, **hyper)
    train(model, optimizer, 3)
    if way == "between predict and update":
        optimizer.predict()
    if way in ("deepcopy", "pickle"):
        copied = copy.deepcopy if way == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
        restored, resumed = copied((model, optimizer))
    else:
        through = through_file if way == "file" else lambda state: state
        restored = net(seed=1)
        restored.load_state_dict(through(model.state_dict()))
        resumed = make(name, restored)  # the hyper-parameters come with the state, as in torch
        resumed.load_state_dict(through(optimizer.state_dict()))
    train(model, optimizer, 3, first=3)
    train(restored, resumed, 3, first=3)
    assert_same(snapshot(restored, resumed), snapshot(model, optimizer), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_filter_stays_float64_in_a_half_precision_model(name):
    model = net()
    optimizer = make(name, model)
    train(model, optimizer, 3)
    half = net(torch.bfloat16)
    loaded = make(name, half)
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    for key, value in loaded.diagnostics().items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, optimizer.diagnostics()[key], rtol=0, atol=0)
    for p, q in zip(model.parameters(), half.parameters(), strict=True):
        for key, value in loaded.state.get(q, {}).items():
            assert value.dtype == (torch.bfloat16 if key in loaded.buffers else torch.float64)
            if value.dtype == torch.float64:
                torch.testing.assert_close(value, optimizer.state[p][key], rtol=0, atol=0)
    train(half, loaded, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_state_dict(name, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = net()
    optimizer = make(name, model, weight_decay=0.01)
    train(model, optimizer, 3)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    restored = net(seed=1)
    restored.load_state_dict(model.state_dict())
    fresh = make(name, restored)
    untouched = snapshot(restored, fresh)
    target = get_optimizer_state_dict(restored, fresh, options=options)  # what dcp.load loads into
    assert target.keys() >= ({"state", "param_groups"} if not flatten else {"param_groups.conv.weight.lr"})
    assert all(torch.equal(v, untouched[k]) for k, v in snapshot(restored, fresh).items() if k.startswith("weights"))
    set_optimizer_state_dict(restored, fresh, state, options=options)
    for m, o in ((model, optimizer), (restored, fresh)):
        train(m, o, 2, first=3)
    seen, truth = snapshot(restored, fresh), snapshot(model, optimizer)
    assert_same({k: seen[k] for k in truth}, truth, rtol=0, atol=0)


def scalars_of(state):
    """What a state_dict holds that is no buffer: filter state, rates, scalars of each tensor."""
    groups = [value for group in state["param_groups"] for value in group.values() if isinstance(value, torch.Tensor)]
    return groups + [value for entry in state["state"].values() for value in entry.values() if value.dim() == 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_is_a_snapshot_of_the_filter(name, fused):
    """R, s, P, drift, q_x, t, S and a rate that is a tensor: "keep the best state" keeps it."""
    model = net()
    model.scale.requires_grad_(False)  # a weight of 0 dimensions has buffers of 0 dimensions, which are the optimizer's
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = make(name, groups, lr=torch.tensor(0.1, dtype=torch.float64), fused=fused)
    train(model, optimizer, 2)
    kept = optimizer.state_dict()
    before = [value.clone() for value in scalars_of(kept)]
    optimizer.param_groups[0]["lr"].mul_(0.5)
    train(model, optimizer, 2, first=2)
    optimizer.predict()
    assert len(before) >= 4 and all(map(torch.equal, before, scalars_of(kept)))
    assert len({id(group["skipped"]) for group in optimizer.state_dict()["param_groups"]}) == 1  # saved once


@pytest.mark.parametrize("name", NAMES)
def test_torch_takes_no_step_to_save_a_new_optimizer(name):
    """torch.distributed.checkpoint makes state, where there is none, by a step: with a rate of 0 and without a loss."""
    model, other = net(), net()
    plain, saved = make(name, model), make(name, other)
    state = get_optimizer_state_dict(other, saved)
    assert {key for entry in state["state"].values() for key in entry} == {*saved.buffers, *saved.scalars}
    for m, o in ((model, plain), (other, saved)):
        train(m, o, 2)
    assert_same(snapshot(other, saved), snapshot(model, plain), rtol=0, atol=0)
