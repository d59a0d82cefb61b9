"""What torch.optim promises its users, over every optimizer."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.optim import lr_scheduler

import koala
from koala import LossStats

from .cases import IDS, NAMES, VARIANTS, assert_same, batch, closure_for, make, net, snapshot, train

NEEDS_LOSS = [info.name for info in koala.list_optimizers() if info.needs_loss]


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_step_with_closure_is_predict_closure_update(name, hyper):
    by_step, by_hand = net(), net()
    stepping, predicting = make(name, by_step, **hyper), make(name, by_hand, **hyper)
    for step in range(4):
        returned = stepping.step(closure_for(by_step, stepping, batch(step)))
        predicting.predict()
        losses = closure_for(by_hand, predicting, batch(step))()
        predicting.update(losses.mean(), losses.square().mean())
        torch.testing.assert_close(returned, losses)
        assert_same(snapshot(by_step, stepping), snapshot(by_hand, predicting), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("style", ["stats", "loss", "observe", "microbatches"])
def test_other_ways_to_say_the_loss(name, style):
    one, other = net(), net()
    reference, optimizer = make(name, one), make(name, other)
    for step in range(4):
        reference.step(closure_for(one, reference, batch(step)))
        closure = closure_for(other, optimizer, batch(step))
        if style == "stats":
            optimizer.step(lambda closure=closure: LossStats.from_losses(closure()))
            continue
        optimizer.predict()
        if style == "loss":
            losses = closure()
            optimizer.step(loss=losses.mean(), loss_var=losses.square().mean())
            continue
        optimizer.zero_grad()
        images, targets = batch(step)
        losses = F.cross_entropy(other(images), targets, reduction="none")
        for part in losses.split(8 if style == "observe" else 3):
            (optimizer.observe(part) * len(part) / 8).backward(retain_graph=True)
        optimizer.step()
    assert_same(snapshot(other, optimizer), snapshot(one, reference), rtol=1e-12, atol=1e-13)


def test_a_scalar_loss_is_one_sample():
    model = net()
    optimizer = koala.VanillaKOALA(model.parameters())
    losses = closure_for(model, optimizer, batch(0))
    optimizer.step(lambda: losses().mean())
    expected = 0.9 + 0.1 * F.cross_entropy(net()(batch(0)[0]), batch(0)[1]).item() ** 2
    assert optimizer.diagnostics()["R"].item() == pytest.approx(expected, rel=1e-12)


READINGS = [("second_moment", 5.0), ("squared_mean", 4.0), ("variance", 1.0)]


@pytest.mark.parametrize(("measurement", "expected"), READINGS)
def test_readings_of_loss_var(measurement, expected):
    model = nn.Linear(2, 1)
    optimizer = koala.KOALAPlusPlus(model.parameters(), alpha_r=0.0, measurement=measurement)
    losses = torch.tensor([1.0, 3.0])  # mean 2, mean of squares 5
    model(torch.ones(1, 2)).sum().backward()
    optimizer.observe(losses)
    optimizer.step()
    assert optimizer.diagnostics()["R"].item() == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_their_own_rate_and_decay(name):
    model, frozen_rate = net(), net()
    groups = [
        {"params": frozen_rate.conv.parameters(), "lr": 0.0},
        {"params": frozen_rate.linear.parameters(), "weight_decay": 0.1},
    ]
    optimizer = koala.create_optimizer(name, groups, lr=0.1)
    before = frozen_rate.conv.weight.clone()
    train(frozen_rate, optimizer, 3)
    torch.testing.assert_close(frozen_rate.conv.weight, before, rtol=0, atol=0)
    plain = koala.create_optimizer(name, model.linear.parameters(), lr=0.1)
    train(model, plain, 3)
    assert not torch.allclose(model.linear.weight, frozen_rate.linear.weight)


def test_two_groups_are_one_filter():
    """Splitting the parameters into groups of equal settings changes nothing: P, q and the maximum run over all."""
    for name in NAMES:
        one, other = net(), net()
        whole = make(name, one, weight_decay=0.01)
        split = koala.create_optimizer(
            name, [{"params": [p]} for p in other.parameters()], weight_decay=0.01, lr=whole.defaults["lr"]
        )
        train(one, whole, 4)
        train(other, split, 4)
        assert_same(snapshot(other, split), snapshot(one, whole), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_rate_as_a_tensor(name, fused):
    one, other = net(), net()
    number = make(name, one, lr=0.3, fused=fused)
    tensor = make(name, other, lr=torch.tensor(0.3, dtype=torch.float64), fused=fused)
    for optimizer, model in ((number, one), (tensor, other)):
        train(model, optimizer, 2)
        optimizer.param_groups[0]["lr"] *= 0.5
        train(model, optimizer, 2, first=2)
    assert_same(snapshot(other, tensor), snapshot(one, number), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "make_schedule",
    [
        lambda o: lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=9, cycle_momentum=False),
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]),
        lr_scheduler.ReduceLROnPlateau,
    ],
)
@pytest.mark.parametrize("style", ["step", "update"])
def test_schedulers_do_not_warn(name, make_schedule, style):
    model = net()
    optimizer = make(name, model, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = make_schedule(optimizer)
        for step in range(4):
            closure = closure_for(model, optimizer, batch(step))
            if style == "step":
                loss = optimizer.step(closure).mean()
            else:
                optimizer.predict()
                loss = closure().mean()
                optimizer.update(loss, loss**2)
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(loss.detach()) if plateau else scheduler.step()


@pytest.mark.parametrize("name", NAMES)
def test_hooks_fire_once_in_both_styles(name):
    model = net()
    optimizer = make(name, model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step(closure_for(model, optimizer, batch(0)))
    optimizer.predict()
    closure_for(model, optimizer, batch(1))()
    optimizer.update(1.0, 1.0)
    assert seen == ["before", "after"] * 2


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


@pytest.mark.parametrize("name", NAMES)
def test_add_param_group_joins_the_filter(name):
    model = net()
    optimizer = koala.create_optimizer(name, model.conv.parameters(), lr=0.1)
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": model.linear.parameters(), "lr": 0.05})
    before = model.linear.weight.clone()
    train(model, optimizer, 2, first=2)
    assert not torch.equal(before, model.linear.weight)
    for key in set(optimizer.filter_state) - {"go"}:
        assert optimizer.param_groups[1][key] is optimizer.diagnostics()[key]


@pytest.mark.parametrize("name", NAMES)
def test_frozen_unused_and_empty_parameters_stay(name):
    model = net()
    optimizer = make(name, model)
    train(model, optimizer, 3)
    assert torch.equal(model.frozen, torch.ones(2, dtype=torch.float64))
    assert torch.equal(model.unused, torch.ones(3, dtype=torch.float64))
    assert not optimizer.state.get(model.frozen)
    assert model.scale.dim() == 0 and model.scale != 1


@pytest.mark.parametrize("name", NAMES)
def test_memory_layout_changes_nothing(name, fused):
    """Channels-last weights, a weight that is a strided view, gradients laid out unlike their weights."""
    finals = []
    for layout in ("contiguous", "channels_last", "strided", "late"):
        model = net()
        if layout == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        if layout == "strided":
            base = torch.zeros(3, 32, dtype=torch.float64)
            base[:, ::2] = model.linear.weight.detach()
            model.linear.weight = nn.Parameter(base[:, ::2])
            assert not model.linear.weight.is_contiguous()
            model.linear.weight.register_hook(lambda grad: grad.t().contiguous().t())
        optimizer = make(name, model, weight_decay=0.01, fused=fused)
        train(model, optimizer, 2)
        if layout == "late":
            model.conv.weight.data = model.conv.weight.data.to(memory_format=torch.channels_last)
        train(model, optimizer, 2, first=2)
        finals.append(snapshot(model, optimizer))
    for final in finals[1:]:
        assert_same(final, finals[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).double())
    optimizer = make(name, model, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(step)
        losses = model[1](model[0](torch.randn(5, 4)).double()).square().mean(1)
        losses.mean().backward()
        optimizer.step(loss=losses.mean(), loss_var=losses.square().mean())
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.float64] * 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_network_learns(fused):
    hypers = {"koala-v": {"sigma": 0.1}, "koala-m": {}, "koala++": {"sigma": 0.1, "q": 0.1}, "sofim": {}}
    for name, hyper in hypers.items():
        model = net()
        optimizer = make(name, model, **hyper, fused=fused)
        images, targets = batch(0, size=32)
        before = F.cross_entropy(model(images), targets)
        for _ in range(60):
            optimizer.step(closure_for(model, optimizer, (images, targets)))
        assert F.cross_entropy(model(images), targets) < 0.5 * before, name


@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler(name):
    """Norms are those of the unscaled gradients; a step whose gradients overflowed is left out."""
    one, other = net(torch.float32), net(torch.float32)
    reference, optimizer = make(name, one, lr=0.1), make(name, other, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        data = batch(step, dtype=torch.float32)
        reference.predict()
        losses = closure_for(one, reference, data)()
        reference.step(loss=losses.mean(), loss_var=losses.square().mean())
        optimizer.predict()
        optimizer.zero_grad()
        losses = F.cross_entropy(other(data[0]), data[1], reduction="none")
        scaler.scale(losses.mean()).backward()
        scaler.step(optimizer, loss=losses.mean(), loss_var=losses.square().mean())
        scaler.update()
    assert_same(snapshot(other, optimizer), snapshot(one, reference), rtol=1e-4, atol=1e-6)
    before = snapshot(other, optimizer)
    closure_for(other, optimizer, batch(9, dtype=torch.float32))()
    other.scale.grad.fill_(float("inf"))
    scaler.step(optimizer, loss=1.0)
    scaler.update()
    assert_same(snapshot(other, optimizer), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_repr_names_the_settings(name):
    text = repr(make(name, net()))
    assert type(make(name, net())).__name__ in text and "weight_decay: 0" in text


@pytest.mark.parametrize("name", NEEDS_LOSS)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.step(), "was given no loss"),
        (lambda o: o.update(), "was given no loss"),
        (lambda o: o.step(lambda: None), "closure must return a loss"),
        (lambda o: o.step(lambda: 1.0, loss=1.0), "not both"),
        (lambda o: o.update(None, 1.0), "was given no loss"),
        (lambda o: o.update(torch.ones(2), 1.0), r"loss must be a scalar, got shape \(2,\)"),
        (lambda o: o.update(1.0, torch.ones(3)), r"loss_var must be a scalar, got shape \(3,\)"),
        (lambda o: o.step(loss=torch.ones(2, 2)), "loss must be a scalar"),
    ],
)
def test_wrong_losses_are_refused(name, call, message):
    model = net()
    optimizer = make(name, model)
    closure_for(model, optimizer, batch(0))()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        call(optimizer)
    assert all(torch.equal(value, before[key]) for key, value in snapshot(model, optimizer).items() if key in before
               and key.startswith("weights"))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_wrong_hyper_parameters_are_refused(name):
    defaults = make(name, net()).defaults
    for key, value in defaults.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("sc", "lower_bound"):
            with pytest.raises(ValueError, match=f"{key} must not be negative, got -0.5"):
                make(name, net(), **{key: -0.5})
            with pytest.raises(ValueError, match=f"{key} must not be negative"):
                make(name, net(), **{key: float("nan")})
    with pytest.raises(TypeError, match=r"no argument 'momentun'.*weight_decay"):
        make(name, net(), momentun=0.9)
    with pytest.raises(ValueError, match="lr as a tensor must have one element"):
        make(name, net(), lr=torch.ones(2))
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        koala.create_optimizer(name, [{"params": net().parameters(), "weight_decay": -1.0}])
    key = {"sofim": "beta", "sgdf": "eps"}.get(name, "alpha_r")
    with pytest.raises(ValueError, match=f"{key} belongs to the whole filter"):
        koala.create_optimizer(name, [{"params": net().parameters(), key: 0.5}])
    with pytest.raises(ValueError, match="not of a"):
        sgd = torch.optim.SGD(net().parameters(), lr=0.1)
        make(name, net()).load_state_dict(sgd.state_dict())


def test_covariance_that_is_none_is_refused():
    with pytest.raises(ValueError, match="sc"):
        koala.MomentumKOALA(net().parameters(), sw=0.1, sc=0.2, sv=0.1)
    with pytest.raises(ValueError, match="target"):
        koala.MomentumKOALA(net().parameters(), target=0.0)
    koala.MomentumKOALA(net().parameters(), sc=-0.05)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_and_complex_are_refused(name):
    with pytest.raises(ValueError, match="complex"):
        koala.create_optimizer(name, [nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = koala.create_optimizer(name, embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step(loss=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_predict_moves_nothing(name):
    model = net()
    optimizer = make(name, model)
    train(model, optimizer, 2)
    optimizer.predict()
    before = snapshot(model, optimizer)
    optimizer.predict()
    assert_same(snapshot(model, optimizer), before, rtol=0, atol=0)


def test_every_tensor_skipped_leaves_the_filter():
    """Gradients of exactly zero: weights and posterior covariance stay what the prediction made them."""
    for name in NEEDS_LOSS:
        model = net()
        optimizer = make(name, model, r=1.0)
        train(model, optimizer, 3)
        optimizer.predict()
        for p in model.parameters():
            p.grad = None if p.grad is None else torch.zeros_like(p)
        before = {key: value for key, value in snapshot(model, optimizer).items() if not key.startswith("velocity")}
        optimizer.update(1.0, 1.0)
        after = snapshot(model, optimizer)
        for key in before:
            if not key.startswith("filter.P") and key not in ("filter.qx", "filter.drift", "filter.gain"):
                torch.testing.assert_close(after[key], before[key], rtol=0, atol=0, msg=f"{name} {key}")


def test_registry():
    assert NAMES == ["koala-v", "koala-m", "koala++", "sofim", "sgdf"]
    with pytest.raises(ValueError, match="'koala-x'.*koala-v, koala-m"):
        koala.create_optimizer("koala-x", net().parameters())
    for info in koala.list_optimizers():
        assert issubclass(info.cls, torch.optim.Optimizer) and info.description and info.paper
