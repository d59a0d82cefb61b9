"""What torch asks of its own optimizers (test_optim.py, over OptimizerInfo), asked of these.

Not asked, as torch's own infos exempt optimizers from them by flag: `capturable`, `differentiable`, `maximize` and
`foreach` (there are no such arguments: steps read nothing back on any device, and a filter of the loss has no ascent),
sparse gradients and complex parameters (refused, see test_refusals.py), and a step without any loss (a filter measures
it; SOFIM's may be without).
"""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

import koala

# Torch's test utilities forbid, for the whole process, to set backend flags; the runs of other tests set them.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True


def inputs_of(info):
    """The kwargs that torch runs each test over: defaults, another rate, a tensor rate, decay, both implementations."""
    return lambda device, dtype=None: [
        OptimizerInput(params=None, kwargs={}, desc="default"),
        OptimizerInput(params=None, kwargs={"lr": 0.2}, desc="non-default lr"),
        OptimizerInput(params=None, kwargs={"lr": torch.tensor(0.2)}, desc="tensor lr"),
        OptimizerInput(params=None, kwargs={"weight_decay": 0.01}, desc="non-zero weight_decay"),
        OptimizerInput(params=None, kwargs={"weight_decay": 0.01, "fused": False}, desc="portable"),
    ]


FOUR = ("koala-v", "koala-m", "koala++", "sofim")
INFOS = [
    OptimizerInfo(
        info.cls,
        optim_inputs_func=inputs_of(info),
        scheduler_inputs=(
            [],
            [lambda optimizer: StepLR(optimizer, gamma=0.9, step_size=10)],
            [lambda optimizer: CosineAnnealingLR(optimizer, 60, eta_min=0.01), ReduceLROnPlateau],
        ),
        supported_impls=("fused",),
        supports_complex=False,
        optim_error_inputs_func=get_error_inputs_for_all_optims,
    )
    for info in koala.list_optimizers()
    if info.name in FOUR
]
CASES = [pytest.param(info, given, id=f"{info.name}-{given.desc}") for info in INFOS
         for given in info.optim_inputs_func("cpu")]  # fmt: skip
EACH = pytest.mark.parametrize(("info", "given"), CASES)
INFO = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def problem(contiguous=True, seed=0):
    """Torch's: a weight, a bias and an input; the loss is the sum of squares of their affine map."""
    torch.manual_seed(seed)
    weight = torch.randn(10, 5) if contiguous else torch.randn(10, 5, 2)[..., 0]
    bias = torch.randn(10) if contiguous else torch.randn(10, 2)[..., 0]
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    data = torch.randn(5)
    return [weight, bias], lambda: (weight.mv(data) + bias).pow(2).sum()


def closure_for(optimizer, loss_of):
    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


def built(info, given, params):
    return info.optim_cls(params, **{k: v.clone() if torch.is_tensor(v) else v for k, v in given.kwargs.items()})


def weights(params):
    return [p.detach().clone() for p in params]


@EACH
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", range(3))
def test_goes_in_the_right_direction(info, given, contiguous, schedulers):
    params, loss_of = problem(contiguous)
    optimizer = built(info, given, params)
    schedules = [make(optimizer) for make in info.scheduler_inputs[schedulers]]
    first = loss_of().item()
    for _ in range(20):
        loss = optimizer.step(closure_for(optimizer, loss_of))
        for schedule in schedules:
            schedule.step(loss.detach()) if isinstance(schedule, ReduceLROnPlateau) else schedule.step()
    assert loss_of().item() < first


@EACH
def test_no_gradient_is_no_step(info, given):
    params, _ = problem()
    optimizer = built(info, given, params)
    before = weights(params)
    optimizer.step(loss=1.0)
    assert all(map(torch.equal, weights(params), before))
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(loss=1.0)
    if "weight_decay" not in given.kwargs or info.name != "SOFIM":  # whose decay is ordinary L2
        assert all(map(torch.equal, weights(params), before))


@INFO
@pytest.mark.parametrize("which", range(len(get_error_inputs_for_all_optims("cpu", torch.float32))))
def test_errors(info, which):
    error = info.optim_error_inputs_func("cpu", torch.float32)[which]
    given = error.optimizer_error_input
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    printed = {"Tensor lr must be 1-element": "lr as a tensor must have one element"}  # in our words
    with expected(error.error_type, match=printed.get(error.error_regex, error.error_regex)):
        info.optim_cls(given.params, **given.kwargs)


@INFO
def test_named_parameters(info):
    model = nn.Linear(3, 2)
    optimizer = info.optim_cls(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    optimizer.step(closure_for(optimizer, lambda: model(torch.ones(2, 3)).square().mean()))
    again = info.optim_cls(nn.Linear(3, 2).named_parameters())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["param_names"] == ["weight", "bias"]
