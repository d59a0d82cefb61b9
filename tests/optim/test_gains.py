"""The gains in C++ are those of the filters' files, on random tables: rows, rates, state, skips."""

import pytest
import torch

from .cases import IDS, VARIANTS, batch, closure_for, make, net

inf, nan = float("inf"), float("nan")


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("sums", [(8.0, 6.0, 9.0), (3.0, -2.0, 4.0), (8.0, nan, 9.0), (1.0, 1.0, inf)], ids=str)
def test_cpp_gains_are_the_filters_own(name, hyper, sums):
    model = net()
    optimizer = make(name, model, **hyper, fused=True)
    optimizer.step(closure_for(model, optimizer, batch(0)))
    optimizer.predict()
    layout, draws = optimizer._current_layout(), torch.Generator().manual_seed(0)
    n = 40

    def random(*shape):
        return torch.rand(*shape, generator=draws, dtype=torch.float64)

    rows = random(1 + len(optimizer.products), n) * 10 ** (8 * random(n) - 4)
    rows[0] = (random(n) > 0.2).double()
    rows[1, :3] = torch.tensor([0.0, 1e-19, 1e-17])
    rows[2, 5], rows[1, 6], rows[-1, 7] = nan, inf, -inf
    numbers = torch.stack((random(n), random(n) * 0.1, rows[0]))
    scalars = random(len(optimizer.scalars), n)
    scalars[:, n // 2 :] = 0  # tensors at their first step
    state = random(len(optimizer.filter_state))
    losses = torch.tensor(sums, dtype=torch.float64) if optimizer.needs_loss else None

    expected = optimizer.gains(rows, numbers[0], numbers[1], scalars, state, losses)
    seen_scalars, seen_state = scalars.clone(), state.clone()
    coefficients = getattr(torch.ops.koala, f"{optimizer.kernel}_gains")(
        layout.constants(optimizer), rows, numbers, seen_scalars, seen_state, losses
    )
    for seen, truth in zip((coefficients, seen_scalars, seen_state), expected, strict=True):
        # 0 / 0 in both where a gate is closed before the first step: those coefficients are never read
        torch.testing.assert_close(seen, truth, rtol=1e-12, atol=1e-300, equal_nan=True)
    assert not coefficients[:, coefficients[0] > 0].isnan().any()
    assert (
        coefficients[0].sum() == 0 if (nan in sums or inf in sums) and optimizer.needs_loss else coefficients[0].any()
    )
