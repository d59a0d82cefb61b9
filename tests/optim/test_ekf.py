"""The filters that observe outputs, against the dense filter in float64 and against what has a closed form."""

import pytest
import torch
from torch import nn

import koala
from koala.optim import reference_ekf

EXACT = {"rtol": 1e-9, "atol": 1e-12}
GAUSSIAN = {"likelihood": "gaussian", "r": 0.5}


class Net(nn.Module):
    """Two layers, and a frozen, an unused and a 0-dim parameter."""

    def __init__(self, outputs=3):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, outputs)
        self.scale = nn.Parameter(torch.tensor(1.2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) * self.scale) + self.frozen.sum()


def net(dtype=torch.float64, seed=0, outputs=3):
    torch.manual_seed(seed)
    return Net(outputs).to(dtype)


def batch(step, likelihood="categorical", size=5, outputs=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)
    if likelihood == "categorical":
        return x, torch.randint(outputs, (size,), generator=generator)
    return x, torch.randn(size, outputs, generator=generator, dtype=torch.float64).to(dtype)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in trained(model)])


def variances(optimizer, model):
    return torch.cat([optimizer.state[p]["p"].reshape(-1) for p in trained(model)])


def run(model, optimizer, steps, first=0, likelihood="categorical", size=5):
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        x, y = batch(step, likelihood, size, dtype=dtype)
        optimizer.step(lambda x=x, y=y: (model(x), y))


VARIANTS = {
    "default": {},
    "variational": {"covariance": "variational"},
    "dynamics": {"q": 0.01, "gamma": 0.95, "alpha": 0.02, "r": 0.1},
    "dynamics, variational": {"q": 0.01, "gamma": 0.95, "covariance": "variational"},
    "gaussian": GAUSSIAN,
    "gaussian, variational, robust": {**GAUSSIAN, "covariance": "variational", "robust": 0.7},
    "robust": {"robust": 0.5},
    "followed": {"r": None},
    "followed, residual, moving": {"r": None, "noise": "residual", "beta": 0.9, "residual": "prior"},
    "followed, innovation": {"r": None, "noise": "innovation", "beta": 0.8, "r0": 0.3},
    "followed, gaussian": {"likelihood": "gaussian", "r": None, "noise": "innovation", "robust": 2.0},
}
VARIANT = pytest.mark.parametrize("hyper", VARIANTS.values(), ids=VARIANTS.keys())


@VARIANT
@pytest.mark.parametrize("size", [1, 5])
def test_diagonal_is_the_dense_filter_that_starts_from_the_diagonal(hyper, size):
    """Over several steps, each of the dense filter's ending with its projection on a diagonal."""
    model, copy = net(), net()
    kind = hyper.get("likelihood", "categorical")
    optimizer = koala.DiagonalEKF(model.parameters(), p0=0.2, **hyper)
    hyper = dict(hyper)
    project = getattr(reference_ekf, hyper.pop("covariance", "fully_decoupled"))
    P = 0.2 * torch.eye(len(weights(copy)), dtype=torch.float64)
    truth = reference_ekf.EKF(trained(copy), P, project=project, **hyper)
    for step in range(6):
        x, y = batch(step, kind, size)
        optimizer.step(lambda x=x, y=y: (model(x), y))
        truth.predict()
        truth.update(copy(x), y)
        torch.testing.assert_close(weights(model), weights(copy), **EXACT)
        torch.testing.assert_close(variances(optimizer, model), truth.P.diag(), **EXACT)
    if hyper.get("r", 0.0) is None:
        torch.testing.assert_close(optimizer.hyper["R"], truth.R, **EXACT)
    assert optimizer.diagnostics()["skipped"] == 0


LAYERWISE = {
    "default": GAUSSIAN,
    "categorical": {"likelihood": "categorical", "r": 0.0, "robust": 0.5, "p0": 0.3},
    "followed": {"r": None, "noise": "innovation", "beta": 0.9},
}


@pytest.mark.parametrize("hyper", LAYERWISE.values(), ids=LAYERWISE.keys())
@pytest.mark.parametrize(("block_size", "sizes"), [(5, [4, 5, 5, 2, 3, 5, 4, 3]), (12, [4, 12, 12, 3]), (99, [31])])
def test_layerwise_is_the_blocks_of_the_dense_filter(hyper, block_size, sizes):
    """The trainable tensors have 1, 3, 12, 3, 9 and 3 weights."""
    model, copy = net(), net()
    kind = hyper.get("likelihood", "gaussian")
    optimizer = koala.LayerwiseEKF(model.parameters(), block_size, **hyper)
    result = [block.size for block in optimizer.blocks]
    assert result == sizes
    P = hyper.get("p0", 1.0) * torch.eye(len(weights(copy)), dtype=torch.float64)
    truth = reference_ekf.EKF(
        trained(copy), P, project=reference_ekf.blocks(*result), lam=0.98, nu=0.9987, noise_scale=len(result),
        **{"likelihood": kind, **{k: v for k, v in hyper.items() if k != "p0"}},
    )  # fmt: skip
    for step in range(6):
        x, y = batch(step, kind)
        optimizer.step(lambda x=x, y=y: (model(x), y))
        truth.predict()
        truth.update(copy(x), y)
        torch.testing.assert_close(weights(model), weights(copy), **EXACT)
    here = torch.block_diag(*[optimizer.state[block.parts[0][0]][block.key] for block in optimizer.blocks])
    torch.testing.assert_close(here, truth.P, **EXACT)
    torch.testing.assert_close(optimizer.diagnostics()["p"], truth.P.diag().mean(), **EXACT)
    assert optimizer.diagnostics()["forgetting"].item() == pytest.approx(truth.lam)


# --- closed forms


def linear(weight, bias=False):
    weight = torch.as_tensor(weight, dtype=torch.float64)
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=torch.float64)
    model.weight.data.copy_(weight)
    return model


@pytest.mark.parametrize("covariance", ["fully_decoupled", "variational"])
def test_one_weight_and_one_output_by_hand(covariance):
    """h = 3 w at w = 2, observed 5: p = 0.5 + 0.1, S = 9 p + 0.25 = 5.65, K = 3 p / S = 1.8 / 5.65."""
    model = linear([[2.0]])
    optimizer = koala.DiagonalEKF(model.parameters(), 0.5, q=0.1, likelihood="gaussian", r=0.25, covariance=covariance)
    x, y = torch.tensor([[3.0]], dtype=torch.float64), torch.tensor([[5.0]], dtype=torch.float64)
    optimizer.step(lambda: (model(x), y))
    assert model.weight.item() == pytest.approx(2 - 1.8 / 5.65, rel=1e-14)
    assert optimizer.state[model.weight]["p"].item() == pytest.approx(0.6 * 0.25 / 5.65, rel=1e-14)
    assert optimizer.diagnostics()["nis"].item() == pytest.approx(1 / 5.65, rel=1e-14)


def test_one_block_on_a_linear_network_is_least_squares_with_forgetting():
    """Information matrix and vector, solved anew at each step: L <- lambda L + x x^T, b <- lambda b + x y."""
    torch.manual_seed(0)
    model = linear(torch.randn(1, 6))
    optimizer = koala.LayerwiseEKF(model.parameters())
    information, vector = torch.eye(6, dtype=torch.float64), model.weight.detach().clone().view(-1)
    worst = 0.0
    for t in range(1, 201):
        x, y = torch.randn(1, 6, dtype=torch.float64), torch.randn(1, 1, dtype=torch.float64)
        lam = 1 - 0.02 * 0.9987 ** (t - 1)
        assert optimizer.diagnostics()["forgetting"].item() == pytest.approx(lam, rel=1e-14)
        optimizer.step(lambda x=x, y=y: (model(x), y))
        information = lam * information + x.mT @ x
        vector = lam * vector + (x * y).view(-1)
        solved = torch.linalg.solve(information, vector)
        worst = max(worst, float((model.weight.view(-1) - solved).norm() / solved.norm()))
    assert worst < 1e-12
    P = optimizer.state[model.weight]["P.0"]
    torch.testing.assert_close(P, information.inverse(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(P, P.mT, rtol=0, atol=0)


def test_a_batch_is_one_measurement_of_a_linear_network():
    """Whether samples come together or one after the other, without forgetting, one block ends at ridge regression."""
    torch.manual_seed(1)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    together, each = linear(torch.zeros(2, 4)), linear(torch.zeros(2, 4))
    forever = {"p0": 0.7, "lam": 1.0, "nu": 1.0, "r": 0.3}
    one, other = (koala.LayerwiseEKF(model.parameters(), **forever) for model in (together, each))
    one.step(lambda: (together(x), y))
    for i in range(8):
        other.step(lambda i=i: (each(x[i : i + 1]), y[i : i + 1]))
    ridge = torch.linalg.solve(x.mT @ x + 0.3 / 0.7 * torch.eye(4, dtype=torch.float64), x.mT @ y).mT
    for model in (together, each):
        torch.testing.assert_close(model.weight.detach(), ridge, **EXACT)


def test_the_batch_rule_of_deepmd():
    """It is a filter of one sample with one output; of a batch it is the dense filter on DeePMD's one number."""
    model, copy = net(outputs=1), net(outputs=1)
    released, exact = (koala.LayerwiseEKF(m.parameters(), 5, batch_rule=rule)
                       for m, rule in ((model, "deepmd"), (copy, "exact")))  # fmt: skip
    for step in range(4):
        x, y = batch(step, "gaussian", 1, 1)
        for network, optimizer in ((model, released), (copy, exact)):
            optimizer.step(lambda network=network, x=x, y=y: (network(x), y))
    torch.testing.assert_close(weights(model), weights(copy), **EXACT)

    model, copy = net(), net()
    optimizer = koala.LayerwiseEKF(model.parameters(), 5, batch_rule="deepmd")
    sizes = [block.size for block in optimizer.blocks]
    truth = reference_ekf.EKF(
        trained(copy), torch.eye(sum(sizes), dtype=torch.float64), project=reference_ekf.blocks(*sizes), lam=0.98,
        nu=0.9987, noise_scale=len(sizes), likelihood="gaussian", r=1.0,
    )  # fmt: skip
    for step in range(4):
        x, y = batch(step, "gaussian", 5)
        optimizer.step(lambda x=x, y=y: (model(x), y))
        truth.predict()
        outputs = copy(x)
        error = (y - outputs).detach()
        signed = (error.sign() * outputs).sum().view(1, 1) / 3
        truth.update(signed, signed.detach() + 5**0.5 * error.abs().mean())
        torch.testing.assert_close(weights(model), weights(copy), **EXACT)


# --- as everybody trains


@pytest.mark.parametrize("name", ["diagonal-ekf", "lkf"])
def test_memory_layout_of_weights_does_not_matter(name):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()

    models = network(), network().to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    x, y = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    for model in models:
        optimizer = koala.create_optimizer(name, model.parameters(), likelihood="categorical")
        for _ in range(3):
            optimizer.step(lambda model=model: (model(x), y))
    torch.testing.assert_close(weights(models[0]), weights(models[1]), **EXACT)


@pytest.mark.parametrize("name", ["diagonal-ekf", "lkf"])
def test_float32_follows_float64(name):
    finals = []
    for dtype in (torch.float64, torch.float32):
        model = net(dtype)
        run(model, koala.create_optimizer(name, model.parameters(), likelihood="categorical"), 20)
        finals.append(weights(model).double())
    torch.testing.assert_close(*finals, rtol=1e-3, atol=1e-4)


def test_covariances_stay_positive_in_float32():
    """300 steps on samples that leave two of the inputs unexcited, where forgetting lets the covariance grow."""
    model = net(torch.float32)
    optimizer = koala.LayerwiseEKF(model.parameters(), 16, likelihood="categorical", r=0.0)
    for step in range(300):
        x, y = batch(step, size=2, dtype=torch.float32)
        x[:, 2:] = 0
        optimizer.step(lambda x=x, y=y: (model(x), y))
    for block in optimizer.blocks:
        P = optimizer.state[block.parts[0][0]][block.key].double()
        smallest, *_, largest = torch.linalg.eigvalsh(P)
        assert smallest > -1e-5 * largest
    assert optimizer.diagnostics()["skipped"] == 0
