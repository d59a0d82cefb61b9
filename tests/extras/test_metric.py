"""The filter in a metric: against a dense filter, KOALA-V, NAdamW, Muon and its closed forms; and its experiment."""

import math

import pytest
import timm.optim
import torch

from koala import LossStats, VanillaKOALA
from koala.extras.metric import MetricKOALA, orthogonal, update
from koala.tables.cli import EXPERIMENTS
from koala.tables.experiment import load_experiment
from tests.refused import rejected

EXACT = {"rtol": 1e-10, "atol": 1e-13}
METRICS = ("identity", "adam", "muon")


def problem(*shapes):
    """Weights in float64, and a closure whose 8 losses above 0 are drawn anew at each call."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]

    def closure():
        for w in weights:
            w.grad = None
        terms = [(w - torch.randn(8, *w.shape, generator=generator, dtype=torch.float64)).square() for w in weights]
        losses = sum(term.reshape(8, -1).mean(1) for term in terms)
        losses.mean().backward()
        return losses.detach()

    return weights, closure


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def test_it_is_the_dense_filter_whose_posterior_is_read_along_the_gradient():
    weights, closure = problem((3, 2), (4,))
    lr, q, s, R, v = 0.3, 0.5, 0.2, 1.0, 0.0
    optimizer = MetricKOALA(weights, lr, metric="adam", betas=(0.0, 0.9), q=q, sigma=s)
    for t in range(1, 9):
        x = flat(weights)
        losses = optimizer.step(closure)
        L, R = losses.mean(), 0.9 * R + 0.1 * losses.square().mean()
        H = flat([w.grad for w in weights])
        v = 0.9 * v + 0.1 * H**2
        M = torch.diag(1 / ((v / (1 - 0.9**t)).sqrt() + 1e-8))
        P = (s + q) * M
        S = H @ P @ H + R
        K = P @ H / S
        torch.testing.assert_close(flat(weights), x - K * (L - (1 - lr) * L), **EXACT)
        s = H @ (P - S * torch.outer(K, K)) @ H / (H @ M @ H)
        torch.testing.assert_close(optimizer.diagnostics()["s"], s, **EXACT)


def test_with_the_identity_it_is_koala_v():
    """One tensor, so that all have one S; no momentum, no decay."""
    (weights, closure), (others, same) = problem((5, 3)), problem((5, 3))
    ours = MetricKOALA(weights, 0.7, metric="identity", betas=(0.0, 0.99), sigma=0.3, q=0.2, alpha_r=0.8)
    koala = VanillaKOALA(others, 0.7, sigma=0.3, q=0.2, alpha_r=0.8, fused=False)
    for _ in range(10):
        ours.step(closure)
        koala.step(same)
        torch.testing.assert_close(flat(weights), flat(others), **EXACT)
    for name in ("s", "R", "gain"):
        torch.testing.assert_close(ours.diagnostics()[name], koala.diagnostics()[name], **EXACT)


def test_a_constant_step_in_adams_metric_is_nadamw():
    """To the precision of float32, in which timm takes its powers of beta."""
    (weights, closure), (others, same) = problem((5, 3), (2,)), problem((5, 3), (2,))
    ours = MetricKOALA(weights, 0.02, metric="adam", step_size="constant", eps=0.0, weight_decay=0.1)
    theirs = timm.optim.NAdamW(others, lr=0.02, betas=(0.9, 0.99), eps=0.0, weight_decay=0.1)
    for _ in range(10):
        ours.step(closure)
        same()
        theirs.step()
        torch.testing.assert_close(flat(weights), flat(others), rtol=1e-6, atol=0)


def test_a_constant_step_in_muons_metric_is_muon():
    """To the precision of bfloat16, in which torch's iterates."""
    (weights, closure), (others, same) = problem((12, 6), (3, 9)), problem((12, 6), (3, 9))
    ours = MetricKOALA(weights, 0.02, metric="muon", step_size="constant", weight_decay=0.1)
    theirs = torch.optim.Muon(others, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.step(closure)
        same()
        theirs.step()
    torch.testing.assert_close(flat(weights), flat(others), rtol=0, atol=0.02 * flat(weights).abs().max().item())


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (8, 2, 3, 3)])
def test_newton_schulz_keeps_singular_vectors_and_brings_values_near_1(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, values, V = torch.linalg.svd(x.flatten(1), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert ((0.6 < values) & (values < 1.3)).all()
    scale = 0.2 * math.sqrt(max(U.shape[0], V.shape[1]))
    torch.testing.assert_close(orthogonal(x).flatten(1), scale * U @ torch.diag(values) @ V, rtol=1e-6, atol=1e-6)


def test_what_no_matrix_is_has_adams_metric():
    shapes = (1500, 2), (2, 1500), (7,), ()
    (weights, closure), (others, same) = problem(*shapes), problem(*shapes)
    muon, adam = MetricKOALA(weights, metric="muon"), MetricKOALA(others, metric="adam")
    for _ in range(3):
        muon.step(closure)
        adam.step(same)
    assert torch.equal(flat(weights), flat(others))


@pytest.mark.parametrize("ratio", [1e-8, 1e-3, 1.0, 1e3, 1e8])
def test_the_rate_settles_at_its_closed_form(ratio):
    """`ratio` is R / (q G). In docs/metric.md."""
    q, G, L, lr = 0.7, torch.tensor(3.0, dtype=torch.float64), 2.0, 0.4
    R = ratio * q * G
    group = {"filter": {"R": R, "s": 5 * q * torch.ones_like(R)}, "q": q, "alpha_r": 1.0}
    for _ in range(100_000 if ratio > 1e5 else 1000):
        tau = lr * update(group, LossStats.from_mean(L, 99.0), G)
    gain = 2 / (1 + math.sqrt(1 + 4 * ratio))
    assert float(group["filter"]["gain"]) == pytest.approx(gain, rel=1e-6)
    assert float(tau) == pytest.approx(lr * L / float(G) * gain, rel=1e-6)
    assert float(group["filter"]["s"]) == pytest.approx(q / gain - q, rel=1e-6)
    limit = L / float(G) if ratio < 1 else L * math.sqrt(q / float(R * G))  # the Polyak step; a step of constant length
    if ratio < 1e-6 or ratio > 1e6:
        assert float(tau) == pytest.approx(lr * limit, rel=1e-3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("metric", "adamw"),
        ("step_size", "polyak"),
        ("lr", -1.0),
        ("q", math.nan),
        ("alpha_r", 1.5),
        ("betas", (0.9, 1.0)),
    ],
)
def test_wrong_values_are_refused(key, value):
    with rejected(ValueError, key):
        MetricKOALA(problem((2,))[0], **{key: value})


def test_more_than_one_group_is_refused():
    one, other = problem((2,), (3,))[0]
    with rejected(ValueError, "MetricKOALA"):
        MetricKOALA([{"params": [one]}, {"params": [other]}])


EXPERIMENT = load_experiment(EXPERIMENTS, "metric")


@pytest.mark.parametrize("profile", ["cpu", "cpu-constant", "cpu-clipping"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_pair_of_the_experiment_differs_in_its_step_alone(metric, profile):
    """So that comparing the two compares the filter with a constant step, each at six rates, a factor of 4 apart."""
    for key in EXPERIMENT.keys():
        if key["optim"] == f"{metric}-filter":
            ours, other = (
                [(point["optim.lr"], {text for text in overrides if not text.startswith("optim.lr=")})
                 for point, overrides in EXPERIMENT.cell(key | {"optim": name}, EXPERIMENT.profile(profile)).settings]
                for name in (f"{metric}-filter", f"{metric}-constant")
            )  # fmt: skip
            assert all(other[0][1] - overrides == {"optim.step_size=constant"} for _, overrides in ours)
            assert all(overrides - ours[0][1] == {"optim.step_size=constant"} for _, overrides in other)
            for rates in ([rate for rate, _ in settings] for settings in (ours, other)):
                assert len(rates) == 6 and all(rates[at + 1] / rates[at] == pytest.approx(4) for at in range(5))
