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

from .cases import IDS, NAMES, VARIANTS, assert_same, make, net, snapshot, train


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_continues_bit_identically(name, hyper, way):
    model = net()
    optimizer = make(name, model, **hyper)
    train(model, optimizer, 3)
    if way == "state_dict":
        restored = net(seed=1)
        restored.load_state_dict(through_file(model.state_dict()))
        resumed = make(name, restored)  # the hyper-parameters come with the state, as in torch
        resumed.load_state_dict(through_file(optimizer.state_dict()))
    else:
        copied = copy.deepcopy if way == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
        restored, resumed = copied((model, optimizer))
    train(model, optimizer, 3, first=3)
    train(restored, resumed, 3, first=3)
    assert_same(snapshot(restored, resumed), snapshot(model, optimizer), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_state_saved_between_predict_and_update(name):
    model = net()
    optimizer = make(name, model)
    train(model, optimizer, 2)
    optimizer.predict()
    restored = copy.deepcopy(model)
    resumed = make(name, restored)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for m, o in ((model, optimizer), (restored, resumed)):
        train(m, o, 2, first=2)
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
