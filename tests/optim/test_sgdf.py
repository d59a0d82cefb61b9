"""SGDF: published trajectories (tests/optim/golden_sgdf.json), its limits and edges, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from koala import SGDF
from koala.optim import reference
from tests.refused import rejected

from .cases import make
from .test_golden import sample_losses, tensor

GOLDEN = json.loads((Path(__file__).parent / "golden_sgdf.json").read_text())
IDS = [f"{case['variant']}-{'-'.join(case['hyperparameters']) or 'default'}" for case in GOLDEN["cases"]]


@pytest.mark.parametrize("implementation", ["reference", "portable", "fused"])
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=IDS)
def test_matches_the_published_implementation(case, implementation):
    params = {name: tensor(values).requires_grad_() for name, values in GOLDEN["params"].items()}
    hyper = {"eps_reading": "released" if case["variant"] == "released" else "paper", **case["hyperparameters"]}
    fused = None if hyper.get("use_muon") else True  # which is portable everywhere
    cls = reference.SGDF if implementation == "reference" else SGDF
    optimizer = cls(params.values(), fused=False if implementation == "portable" else fused, **hyper)

    def close(value):
        return pytest.approx(value, rel=1e-12, abs=1e-300)

    for step, lr in enumerate(case["lr"]):
        optimizer.param_groups[0]["lr"] = lr
        for p in params.values():
            p.grad = None
        sample_losses(params, step).mean().backward()
        optimizer.step()
        assert [p.norm().item() for p in params.values()] == close(case["param_norm"][step])
        for name, p in params.items():
            index = list(params).index(name)
            if case["m_norm"][step][index] is not None:
                assert optimizer.state[p]["m"].norm().item() == close(case["m_norm"][step][index])
                assert optimizer.state[p]["s"].sum().item() == close(case["s_sum"][step][index])
    for name, values in case["final"].items():
        torch.testing.assert_close(params[name].detach(), tensor(values), rtol=1e-12, atol=1e-14)


def sgdf(params, lr=0.5, **hyper):
    return make("sgdf", params, lr=lr, **hyper)


def weights(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))


def gradients(x, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x.grad = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        yield x.grad


def test_without_memory_it_is_sgd(fused):
    x, y = weights(7, 5), weights(7, 5)
    ours = sgdf([x], 0.3, betas=(0.0, 0.999), weight_decay=0.1, fused=fused)
    sgd = torch.optim.SGD([y], 0.3, weight_decay=0.1)
    for g in gradients(x, 5):
        y.grad = g.clone()
        ours.step()
        sgd.step()
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_a_zero_gradient_takes_part_and_a_missing_one_does_not(fused):
    zero, missing = weights(4), weights(4)
    optimizer = sgdf([zero, missing], fused=fused)
    missing.grad = torch.ones_like(missing)
    for step in range(3):
        zero.grad = torch.zeros_like(zero)
        optimizer.step()
        if step == 0:
            missing.grad = None
            before = [t.detach().clone() for t in (missing, *optimizer.state[missing].values())]
    assert torch.equal(zero, weights(4)) and optimizer.state[zero]["t"].item() == 3
    assert all(map(torch.equal, before, (missing, *optimizer.state[missing].values())))
    assert optimizer.state[missing]["t"].item() == 1


def test_decay_is_not_left_in_the_gradient(fused):
    x = weights(6)
    (g,) = gradients(x, 1)
    kept = g.clone()
    sgdf([x], weight_decay=0.1, fused=fused).step()
    assert torch.equal(x.grad, kept)


def test_muon_orthogonalises_in_any_memory_layout():
    plain, last = weights(6, 3, 2, 2), weights(6, 3, 2, 2)
    last.data = last.data.to(memory_format=torch.channels_last)
    tall = weights(8, 3)
    before = tall.detach().clone()
    optimizer = SGDF([plain, last, tall], 1.0, use_muon=True, use_sign=True)
    for (a, b), c in zip(zip(gradients(plain, 3), gradients(last, 3), strict=True), gradients(tall, 3), strict=True):
        assert a is not c
        b.copy_(a)
        optimizer.step()
    torch.testing.assert_close(plain, last.contiguous(), rtol=0, atol=0)
    assert plain.isfinite().all()
    first = SGDF([tall := nn.Parameter(before.clone())], 1.0, use_muon=True)
    tall.grad = before.clone()
    first.step()
    singular = torch.linalg.svdvals(before - tall.detach()) / (8 / 3) ** 0.5
    assert (singular > 0.5).all() and (singular < 1.4).all()


def test_muon_refuses_parts_of_tensors(two_ranks):
    mesh = init_device_mesh("cpu", (2,))
    part = nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)]))
    optimizer = SGDF([part], use_muon=True, process_group=False)
    part.grad = torch.ones_like(part)
    with rejected(NotImplementedError, "use_muon=True"):
        optimizer.step()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0), ("betas", (0.9, 1.0)), ("betas", (-0.1, 0.9)), ("eps", 0.0), ("gamma", 0.0), ("ns_steps", 1),
        ("eps_reading", "mine"), ("weight_decay", -1.0),
    ],
)  # fmt: skip
def test_refuses(key, value):
    with rejected(ValueError, key, value):
        SGDF([weights(2)], **{key: value})
