"""The relatives of the filters against their equations, their limits and what they collapse to."""

import math

import pytest
import torch

from koala.baselines.adabayes import AdaBayes
from koala.baselines.kalman_gradient import KalmanGradientDescent
from koala.baselines.polyak import ALIG, MoMo, MoMoAdam
from tests.refused import rejected

EXACT = {"rtol": 1e-10, "atol": 1e-13}


def problem():
    """Weights of two tensors, and a closure of a noisy quadratic that is above 0, drawn anew at each call."""
    torch.manual_seed(0)
    weights = [
        torch.randn(3, 2, dtype=torch.float64).requires_grad_(),
        torch.randn((), dtype=torch.float64).requires_grad_(),
    ]
    generator = torch.Generator().manual_seed(1)

    def closure():
        shift = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        for w in weights:
            w.grad = None
        loss = (weights[0] - shift).square().sum() + 2 * weights[1].square() + 0.1
        loss.backward()
        return loss.detach()

    return weights, closure


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()


def trajectory(make, steps=12):
    """(weights before, loss, gradient, weights after) of each step, flat."""
    weights, closure = problem()
    optimizer = make(weights)
    for _ in range(steps):
        before = flat(weights)
        loss = optimizer.step(closure)
        yield before, float(loss), flat([w.grad for w in weights]), flat(weights)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_alig(decay):
    b = 0
    for w, loss, g, after in trajectory(lambda w: ALIG(w, 0.05, momentum=0.8, weight_decay=decay)):
        loss, g = loss + decay / 2 * float(w @ w), g + decay * w
        tau = min(0.05, loss / (float(g @ g) + 1e-5))
        b = 0.8 * b - tau * g
        torch.testing.assert_close(after, w - tau * g + 0.8 * b, **EXACT)


@pytest.mark.parametrize("lr", [0.02, 10.0])  # capped, and not
def test_momo(lr):
    beta, decay = 0.7, 0.01
    d, mean, product, taus = 0, 0, 0, []
    for k, (w, loss, g, after) in enumerate(
        trajectory(lambda w: MoMo(w, lr, beta=beta, weight_decay=decay, lower_bound=0.05))
    ):
        old = beta if k else 0
        d = old * d + (1 - old) * g
        mean = old * mean + (1 - old) * loss
        product = old * product + (1 - old) * float(g @ w)
        above = max(0, (1 + lr * decay) * (mean - 0.05 - product) + float(d @ w))
        taus.append(min(lr, above / float(d @ d)))
        torch.testing.assert_close(after, (w - taus[-1] * d) / (1 + lr * decay), **EXACT)
    assert (min(taus) == lr) if lr < 1 else (max(taus) < lr)


def test_momo_adam_whose_loss_never_cuts_is_adam():
    weights, closure = problem()
    adam = torch.optim.Adam(weights, lr=1e-3)
    steps = trajectory(lambda w: MoMoAdam(w, 1e-3, lower_bound=-1e6))
    for _, _, _, after in steps:
        adam.step(closure)
        torch.testing.assert_close(flat(weights), after, **EXACT)


def test_momo_adam_cuts_the_step():
    beta1, beta2, lr, m, v, mean, product, cut = 0.9, 0.999, 0.5, 0, 0, 0, 0, 0
    steps = trajectory(lambda w: MoMoAdam(w, lr, weight_decay=0.02, lower_bound=0.05))
    for k, (w, loss, g, after) in enumerate(steps, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        mean, product = beta1 * mean + (1 - beta1) * loss, beta1 * product + (1 - beta1) * float(g @ w)
        D = (v / (1 - beta2**k)).sqrt() + 1e-8
        above = max(0, (1 + lr * 0.02) * (mean - (1 - beta1**k) * 0.05 - product) + float(m @ w))
        tau = min(lr / (1 - beta1**k), above / float(m @ (m / D)))
        cut += tau < lr / (1 - beta1**k)
        torch.testing.assert_close(after, (w - tau * m / D) / (1 + lr * 0.02), **EXACT)
    assert cut


@pytest.mark.parametrize("kind", [ALIG, MoMo, MoMoAdam])
def test_a_zero_gradient_moves_nothing(kind):
    weights = torch.ones(2, requires_grad=True)
    weights.grad = torch.zeros(2)
    kind([weights]).step(lambda: torch.tensor(0.0))  # the least there is: MoMo divides 0 by 0
    assert torch.equal(weights, torch.ones(2))


def test_the_filter_of_weights_and_gradient_collapses_to_one_gain():
    """Vuckovic's joint filter, dense: z = [w; G], A = [[1, -lr], [0, 1]], observed is G."""
    n, lr = 7, 0.1
    eye, none = torch.eye(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    A = torch.cat([torch.cat([eye, -lr * eye], 1), torch.cat([none, eye], 1)])
    C = torch.cat([none, eye], 1)
    P, z = 0.01 * torch.eye(2 * n, dtype=torch.float64), None
    for w, _, g, after in trajectory(lambda w: KalmanGradientDescent(w, lr, weight_decay=0.1)):
        g = g + 0.1 * w
        z = torch.cat([w, g]) if z is None else z
        z, P = A @ z, A @ P @ A.T + 0.01 * torch.eye(2 * n, dtype=torch.float64)
        K = P @ C.T @ torch.linalg.inv(C @ P @ C.T + 2 * eye)
        z, P = z + K @ (g - C @ z), P - K @ C @ P
        torch.testing.assert_close(after, w - lr * z[n:], **EXACT)


@pytest.mark.parametrize("fixed_point", [False, True])
def test_adabayes(fixed_point):
    B, lr, m, v, S = 4, 1e-2, 0, 0, 0.1 / 4
    s = S
    make = lambda w: AdaBayes(w, lr, batch_size=B, fixed_point=fixed_point)  # noqa: E731
    for t, (w, _, g, after) in enumerate(trajectory(make), start=1):
        g = B * g
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        if fixed_point:
            s = 1 / (1 / (2 * S) + torch.sqrt(1 / (4 * S**2) + (v / (1 - 0.999**t) + 1e-8) / lr**2))
        else:
            a = math.exp(-(lr**2) / S)
            s = 1 / (1 / (a * s + (1 - a) * S) + g**2)
        torch.testing.assert_close(after, w * (1 - lr * 0.05) - s * m / (1 - 0.9**t), **EXACT)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda w: MoMo(w, -1.0), "lr"),
        (lambda w: MoMoAdam(w, betas=(0.9, -0.1)), "betas"),
        (lambda w: MoMo([{"params": w[:1]}, {"params": w[1:]}]), "MoMo"),
        (lambda w: MoMo(w).add_param_group({"params": [w[0].detach().clone()]}), "MoMo"),
        (lambda w: KalmanGradientDescent(w, r=0.0), "r"),
        (lambda w: AdaBayes(w, batch_size=0), "batch_size"),
    ],
)
def test_wrong_values_are_refused(make, name):
    with rejected(ValueError, name):
        make(problem()[0])
