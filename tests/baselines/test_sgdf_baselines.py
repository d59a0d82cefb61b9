"""What SGDF's tables compare with, against equations: M-SVAG with decay, and Sophia-G as it was run."""

from pathlib import Path

import torch
import yaml
from hydra.utils import instantiate

ROOT = Path(__file__).parents[2]


def made(name, weights, **hyper):
    config = yaml.safe_load((ROOT / "configs" / "optim" / f"{name}.yaml").read_text())
    config.pop("name")
    return instantiate(config | hyper, [weights])


def trajectory(optimizer, weights, steps=6):
    """Weights after each step on gradients from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        weights.grad = torch.randn(weights.shape, generator=generator, dtype=weights.dtype)
        yield weights.detach().clone(), weights.grad.clone()
        optimizer.step()


def test_msvag():
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    x, m, v, beta, lr, decay = weights.detach().clone(), 0, 0, 0.9, 0.1, 0.01
    for t, (seen, g) in enumerate(trajectory(made("msvag", weights, weight_decay=decay), weights), start=1):
        torch.testing.assert_close(seen, x, rtol=1e-12, atol=1e-12)
        h = g + decay * x
        m, v, c = beta * m + (1 - beta) * h, beta * v + (1 - beta) * h**2, 1 - beta**t
        rho = min((1 - beta) * (1 + beta**t) / ((1 + beta) * c), 0.9999)
        s = (v / c - (m / c) ** 2) / (1 - rho)
        x = x - lr * (m / c) ** 3 / ((m / c) ** 2 + rho * s).clamp(min=1e-300)
    torch.testing.assert_close(weights.grad, g)


def test_sophia_without_its_hessian_follows_the_sign_of_the_momentum():
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    x, m, lr, decay, beta1 = weights.detach().clone(), 0, 1e-4, 0.1, 0.965
    for seen, g in trajectory(made("sophia-g", weights), weights):
        torch.testing.assert_close(seen, x, rtol=1e-12, atol=1e-12)
        m = beta1 * m + (1 - beta1) * g
        x = x * (1 - lr * decay) - lr * m.sign()
