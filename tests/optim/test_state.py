"""State: loaded with hooks and checks, moved about between steps, and on devices that are not here."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import koala
from tests.refused import rejected

from .cases import IDS, NAMES, VARIANTS, Net, assert_same, make, net, snapshot, train


@pytest.mark.parametrize("name", NAMES)
def test_checks_see_what_the_hooks_left(name):
    """A pre-hook that mends a state is honoured; one that spoils it is refused, and nothing has changed."""
    model = net()
    optimizer = make(name, model)
    train(model, optimizer, 2)
    key = "eps" if name == "sgdf" else optimizer.filter_state[0]  # "skipped" may be missing
    renamed = copy.deepcopy(optimizer.state_dict())
    for group in renamed["param_groups"]:
        group["old"] = group.pop(key)
    restored = net(seed=1)
    loaded = make(name, restored)
    before = snapshot(restored, loaded)
    with rejected(ValueError, type(optimizer).__name__):
        loaded.load_state_dict(renamed)
    assert_same(snapshot(restored, loaded), before, rtol=0, atol=0)

    def mend(_optimizer, state):
        state = copy.deepcopy(state)
        for group in state["param_groups"]:
            group[key] = group.pop("old")
        return state

    loaded.register_load_state_dict_pre_hook(mend)
    loaded.load_state_dict(renamed)
    assert loaded.hyper[key] == optimizer.hyper[key]
    for p, q in zip(model.parameters(), restored.parameters(), strict=True):
        for scalar in optimizer.scalars:
            if p in optimizer.state:
                assert loaded.state[q][scalar] == optimizer.state[p][scalar]


@pytest.mark.parametrize("saved", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_a_state_loads_into_its_own_kind_only(saved, name):
    model = net()
    optimizer = make(saved, model)
    train(model, optimizer, 2)
    other = make(name, net())
    if name == saved:
        other.load_state_dict(optimizer.state_dict())
        return
    with rejected(ValueError, type(other).__name__):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", ["koala-m", "koala++", "sofim"])
def test_a_state_of_another_model_is_refused(name):
    wide, narrow = nn.Linear(4, 3), nn.Linear(3, 4)
    optimizer = make(name, wide)
    wide(torch.ones(2, 4)).sum().backward()
    optimizer.step(loss=1.0)
    with rejected(ValueError, "(3, 4)", "(4, 3)"):
        make(name, narrow).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_what_an_older_state_lacks_is_filled_in(name):
    model = net()
    optimizer = make(name, model)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["skipped"], group["weight_decay"]
        group.pop("go", None)
        group.pop("lower_bound", None)
        group["implementation"] = None
    restored = net(seed=1)
    restored.load_state_dict(model.state_dict())
    resumed = make(name, restored)
    resumed.load_state_dict(state)
    for m, o in ((model, optimizer), (restored, resumed)):
        train(m, o, 2, first=2)
    assert_same(snapshot(restored, resumed), snapshot(model, optimizer), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_first_group(name, fused):
    """As trainers make it where only biases train, which do not decay."""
    model = net()
    groups = [{"params": [], "weight_decay": 0.1}, {"params": list(model.parameters()), "weight_decay": 0.0}]
    optimizer = make(name, groups, fused=fused)
    train(model, optimizer, 3)
    plain = net()
    truth = make(name, plain, fused=fused)
    train(plain, truth, 3)
    assert_same(snapshot(model, optimizer), snapshot(plain, truth), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("move", ["weights", "state", "entries", "scalars"])
def test_what_moved_between_steps_is_found(name, move, fused):
    """A layout is kept between steps; memory that was given back must not be written to."""
    finals = []
    for moves in (False, True):
        model = net()
        optimizer = make(name, model, weight_decay=0.01, fused=fused)
        for step in range(5):
            train(model, optimizer, 1, first=step)
            if not moves:
                continue
            states = [optimizer.state[p] for p in model.parameters() if optimizer.state.get(p)]
            if move == "weights":
                for p in model.parameters():
                    p.data = p.data.clone()
            elif move == "scalars":
                for key, value in optimizer.diagnostics().items():
                    optimizer.param_groups[0][key] = value.clone()
            else:
                for state in states:
                    for key, value in list(state.items()):
                        if move == "state":
                            value.data = value.data.clone()
                        else:
                            state[key] = value.clone()
        finals.append(snapshot(model, optimizer))
    assert_same(*finals, rtol=0, atol=0)


def test_frozen_weights_are_summed_once_and_never_copied():
    """KOALA-M's drift runs over frozen weights too: no float64 copy of them, and no pass over them each step."""
    frozen = nn.Parameter(torch.randn(1 << 20), requires_grad=False)
    p = nn.Parameter(torch.ones(3))
    optimizer = koala.MomentumKOALA([p, frozen])
    peaks = []
    for _ in range(3):
        p.grad = torch.ones_like(p)
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            optimizer.predict()
        sizes = [e.nbytes() for e in profile.kineto_results.events() if e.name() == "[memory]"]
        peaks.append(max(sizes, default=0))
        optimizer.update(1.0, 1.0)
    assert peaks[0] < 8 * frozen.numel() / 4 and max(peaks[1:]) < 10_000
    expected = 0.9 * 0.01 + 0.1 * (frozen.double().square().sum() + 3).sqrt() / (frozen.numel() + 3)
    fresh = koala.MomentumKOALA([p, frozen])
    p.data.fill_(1.0)
    p.grad = torch.ones_like(p)
    fresh.step(loss=1.0)
    assert fresh.diagnostics()["qx"].item() == pytest.approx(expected.item(), rel=1e-9)
    with torch.no_grad():
        frozen.mul_(2)  # a new version is seen
    fresh.predict()
    moved = 4 * frozen.double().square().sum() / 4
    assert fresh.diagnostics()["drift"].item() == pytest.approx(moved.item(), rel=1e-4)


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_a_step_on_a_fake_cuda_device(name, hyper):
    """Finds every host read and every tensor on the wrong device, without a GPU."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = Net()
        optimizer = make(name, model, **hyper, fused=False)
        for step in range(4):
            optimizer.predict()
            for p in model.parameters():  # there is no backward of a fake CUDA
                p.grad = torch.randn_like(p) if p.requires_grad and p is not model.unused else None
            losses = torch.ones(8, device="cuda")
            if step % 2:
                optimizer.step(lambda losses=losses: losses)
            else:
                optimizer.observe(losses)
                optimizer.update()
        for value in optimizer.diagnostics().values():
            assert value.device.type == "cuda" and value.dtype == torch.float64
        for p in model.parameters():
            for value in optimizer.state.get(p, {}).values():
                assert value.device.type == "cuda"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sgdf"])  # TODO: its fake additions want a real MPS
def test_float32_where_there_is_no_float64(name):
    """MPS has none: filter state and sums are float32 there, and nothing on the way is float64."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        p = nn.Parameter(torch.ones(4, device="mps"))
        optimizer = koala.create_optimizer(name, [p], weight_decay=0.01)
        seen = set()
        with _dtypes(seen):
            for _ in range(2):
                optimizer.predict()
                p.grad = torch.ones(4, device="mps")  # there is no backward of a fake MPS
                optimizer.observe(torch.ones(3, device="mps"))
                optimizer.update()
        assert all(value.dtype == torch.float32 for value in optimizer.diagnostics().values())
        assert all(value.dtype == torch.float32 for value in optimizer.state[p].values())
        assert torch.float64 not in seen


class _dtypes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the dtypes of what operations on MPS return."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor) and value.device.type == "mps":
                self.seen.add(value.dtype)
        return out
