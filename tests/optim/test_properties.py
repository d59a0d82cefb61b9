"""What the papers prove or state, over inputs that hypothesis chooses."""

import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import koala
from koala import LossStats

from .cases import NAMES

positive = st.floats(0.01, 100.0)
settings.register_profile("optim", deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
settings.load_profile("optim")


def parameter(values, dtype=torch.float64):
    return nn.Parameter(torch.as_tensor(values, dtype=dtype))


def advance(optimizer, grads, loss=1.0, loss_var=1.0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.predict()
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    optimizer.update(loss, loss_var)


@settings(max_examples=10)
@given(start=positive, q=positive, r=positive, norm=st.floats(0.1, 10.0))
def test_koala_v_covariance_converges_to_the_closed_form(start, q, r, norm):
    """Supplement, eq. 32: the predicted covariance tends to (Q + sqrt(Q^2 + 4 Q R / G^2)) / 2 from any start."""
    optimizer = koala.VanillaKOALA([parameter([0.0, 0.0])], sigma=start, q=q, r=r, lr=0.0)
    grad = torch.tensor([0.6 * norm, 0.8 * norm], dtype=torch.float64)
    limit = (q + math.sqrt(q**2 + 4 * q * r / norm**2)) / 2
    for _ in range(int(20 * (1 + math.sqrt(r / (q * norm**2)))) + 20):
        advance(optimizer, [grad])
    assert optimizer.diagnostics()["s"].item() + q == pytest.approx(limit, rel=1e-6)


@pytest.mark.parametrize("steps", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_covariance_survives_hostile_gradients(steps):
    """P stays symmetric, positive semi-definite and finite over steps of 0, 1e-30, 1e30 and ordinary gradients."""
    choose = torch.Generator().manual_seed(steps)
    sizes = torch.tensor([0.0, 1e-30, 1e-9, 1e-3, 1.0, 1e10, 1e30])
    for cls, way in product((koala.VanillaKOALA, koala.MomentumKOALA), (False, True)):
        hyper = {"weight_decay": 1e-3, "r": None, "fused": way}
        params = [parameter([1.0, -2.0], torch.float32), parameter([[0.5], [3.0]], torch.float32)]
        optimizer = cls(params, **hyper)
        draws = sizes[torch.randint(len(sizes), (steps, 2), generator=choose)]
        signs = torch.randint(2, (steps, 2, 2), generator=choose) * 2.0 - 1
        for step in range(steps):
            grads = [(draws[step, i] * signs[step, i]).view_as(p) for i, p in enumerate(params)]
            advance(optimizer, grads, loss=2.0, loss_var=4.0)
            if step % 50 == 0 or step > steps - 100:
                seen = {key: value.item() for key, value in optimizer.diagnostics().items()}
                assert all(map(math.isfinite, seen.values())), seen
                if cls is koala.VanillaKOALA:
                    assert seen["s"] >= 0
                else:
                    P = torch.tensor([[seen["P11"], seen["P12"]], [seen["P12"], seen["P22"]]], dtype=torch.float64)
                    assert torch.linalg.eigvalsh(P).min() >= -1e-12 * P.trace()
        assert all(p.isfinite().all() for p in params)


@given(data=st.data(), name=st.sampled_from(NAMES))
def test_order_of_parameters_changes_nothing(data, name):
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    order = data.draw(st.permutations(range(4)))
    finals = []
    for permutation in (range(4), order):
        params = [parameter(row) for row in values]
        arranged = [params[i] for i in permutation]
        optimizer = koala.create_optimizer(name, arranged, lr=0.1, weight_decay=0.01)
        for step in range(5):
            advance(optimizer, [(p.detach() * 0.3 + 0.1 * step) for p in arranged], loss=1.0 + step, loss_var=2.0)
        finals.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-12, atol=1e-13)


@given(loss=positive, sigma=positive, q=positive, lr=st.floats(0.01, 2.0))
def test_large_noise_is_loss_scaled_gradient_descent(loss, sigma, q, lr):
    """With R much larger than s |h|^2 the step is lr (s / R) L g."""
    noise = 1e12
    grad = torch.tensor([0.3, -0.4], dtype=torch.float64)
    momentum = {"sw": sigma, "sv": 0.0, "qw": q, "qv": 0.0, "adaptive_q": False, "r": noise, "lr": lr}
    for optimizer, s in (
        (koala.VanillaKOALA([parameter([0.0, 0.0])], sigma=sigma, q=q, r=noise, lr=lr), sigma + q),
        (koala.MomentumKOALA([parameter([0.0, 0.0])], **momentum), sigma + q),
        (koala.KOALAPlusPlus([parameter([0.0, 0.0])], sigma=sigma, q=q, r=noise, lr=lr), sigma + q),
    ):
        advance(optimizer, [grad], loss=loss)
        moved = optimizer.param_groups[0]["params"][0].detach()
        if isinstance(optimizer, koala.KOALAPlusPlus):
            s = (sigma + q) + q  # its first step already carries a second Q
        torch.testing.assert_close(moved * noise, -lr * s * loss * grad, rtol=1e-6, atol=1e-9)


@given(seed=st.integers(0, 2**16), rho=st.floats(0.05, 5.0), precondition=st.sampled_from(["momentum", "gradient"]))
def test_sofim_against_a_dense_solve(seed, rho, precondition):
    """x <- x - lr (m m^T + rho I)^{-1} (m or g), solved densely in float64 over the flat vector of all weights."""
    generator = torch.Generator().manual_seed(seed)
    params = [parameter(torch.randn(3, generator=generator)), parameter(torch.randn(2, 2, generator=generator))]
    optimizer = koala.SOFIM(params, lr=0.1, beta=0.8, rho=rho, weight_decay=0.02, precondition=precondition)
    x = torch.cat([p.detach().flatten() for p in params])
    M = torch.zeros_like(x)
    for step in range(1, 6):
        grads = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
        g = torch.cat([grad.flatten() for grad in grads]) + 0.02 * x
        M = 0.8 * M + 0.2 * g
        m = M / (1 - 0.8**step)
        fisher = torch.outer(m, m) + rho * torch.eye(7, dtype=torch.float64)
        x = x - 0.1 * torch.linalg.solve(fisher, m if precondition == "momentum" else g)
        advance(optimizer, grads)
        torch.testing.assert_close(torch.cat([p.detach().flatten() for p in params]), x, rtol=1e-10, atol=1e-11)


@given(losses=st.lists(st.floats(-100, 100), min_size=1, max_size=30), cut=st.integers(0, 30))
def test_loss_stats_merge(losses, cut):
    losses = torch.tensor(losses, dtype=torch.float64)
    merged = LossStats.from_losses(losses[:cut]) + LossStats.from_losses(losses[cut:])
    assert merged.count == len(losses)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(merged.mean, losses.mean(), **close)
    torch.testing.assert_close(merged.second_moment, losses.square().mean(), **close)
    torch.testing.assert_close(merged.variance, losses.var(correction=0), rtol=1e-7, atol=1e-7)


def test_equal_losses_have_no_variance_below_zero():
    """0.4 three times: the mean of squares is less than the square of the mean by a rounding."""
    assert LossStats.from_losses(torch.full((3,), 0.4, dtype=torch.float64)).variance == 0


def test_skipped_tensor_keeps_its_state():
    """A gradient below 1e-9 leaves weights, buffers and per-tensor scalars; the velocity still decays."""
    for name in ("koala-v", "koala-m", "koala++"):
        params = [parameter([1.0, 2.0]), parameter([3.0])]
        optimizer = koala.create_optimizer(name, params, weight_decay=0.1)
        grads = [torch.tensor([0.5, -0.5], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)]
        for _ in range(2):
            advance(optimizer, grads)
        optimizer.predict()
        weights = params[0].detach().clone()
        state = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
        for p, grad in zip(params, [torch.full((2,), 5e-10, dtype=torch.float64), grads[1]], strict=True):
            p.grad = grad
        optimizer.update(1.0, 1.0)
        assert torch.equal(params[0].detach(), weights)
        for key, value in optimizer.state[params[0]].items():
            expected = 0.9 * state[key] if key == "velocity" else state[key]
            torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=f"{name} {key}")
