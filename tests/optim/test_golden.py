"""Trajectories of the published implementations, matched step by step in float64 (tests/optim/golden.json)."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from koala import KOALAPlusPlus, MomentumKOALA, VanillaKOALA
from koala.optim import reference

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
CLASSES = {"koala_v": VanillaKOALA, "koala_m": MomentumKOALA, "koala_pp": KOALAPlusPlus}
IDS = [f"{case['optimizer']}-{i}" for i, case in enumerate(GOLDEN["cases"])]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def sample_losses(params, step):
    h = tensor(GOLDEN["inputs"][step])
    h = torch.tanh(h @ params["w0"].T + params["b0"])
    h = torch.tanh(h @ params["w1"].T + params["b1"])
    scale = 1 + params["gate"] * (0 if step < 5 else 1)
    logits = (h @ params["w2"].T + params["b2"]) * scale
    return F.cross_entropy(logits, torch.tensor(GOLDEN["targets"][step]), reduction="none")


def covariance(optimizer, params):
    seen = optimizer.diagnostics()
    if isinstance(optimizer, VanillaKOALA):
        return [seen["s"].item()]
    if isinstance(optimizer, MomentumKOALA):
        return [seen[key].item() for key in ("P11", "P12", "P12", "P22")]
    scalars = (optimizer.state[p].get("S") for p in params.values())
    return [None if s is None or s == 0 else s.item() for s in scalars]


@pytest.mark.parametrize("implementation", ["reference", "portable", "fused"])
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=IDS)
def test_matches_the_published_implementation(case, implementation):
    params = {name: tensor(values).requires_grad_() for name, values in GOLDEN["params"].items()}
    hyper = {"measurement": "second_moment", **case["hyperparameters"]}
    cls = CLASSES[case["optimizer"]]
    cls = getattr(reference, cls.__name__) if implementation == "reference" else cls
    optimizer = cls(params.values(), **hyper, fused=implementation == "fused")
    tolerance = 2e-6 if case["optimizer"] == "koala_m" else 1e-10

    def close(value):
        return pytest.approx(value, rel=tolerance, abs=tolerance)

    for step, lr in enumerate(case["lr"]):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.predict()
        losses = sample_losses(params, step)
        optimizer.zero_grad()
        losses.mean().backward()
        loss, second_moment = losses.mean(), losses.square().mean()
        assert loss.item() == close(case["loss"][step])
        assert second_moment.item() == close(case["loss_second_moment"][step])
        optimizer.update(loss, second_moment)
        assert [p.norm().item() for p in params.values()] == close(case["param_norm"][step])
        assert optimizer.diagnostics()["R"].item() == close(case["R"][step])
        expected = case["covariance"][step]
        expected = [expected] if isinstance(expected, float) else expected
        seen = covariance(optimizer, params)
        assert [s is None for s in seen] == [e is None for e in expected]
        assert [s for s in seen if s is not None] == close([e for e in expected if e is not None])
    for name, values in case["final"].items():
        torch.testing.assert_close(params[name].detach(), tensor(values), rtol=tolerance, atol=tolerance)
