"""The Jacobian of outputs, in blocks of rows, against one backward pass for each of them."""

import pytest
import torch

from koala.optim import reference_ekf
from koala.optim.jacobian import jacobian

from .test_ekf import batch, net, trained


class Doubled(torch.autograd.Function):
    """Its backward looks at a value, which cannot be vectorised."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient if gradient.sum().item() else 2 * gradient


def test_rows_of_a_sparse_embedding_are_those_of_a_dense_one():
    table, head = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.ones(3, dtype=torch.float64)
    rows = []
    for sparse in (False, True):
        outputs = torch.nn.functional.embedding(torch.tensor([0, 3, 3]), table, sparse=sparse).square() @ head
        rows += jacobian(outputs, [table], 2)
    assert torch.equal(*rows)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 100])
@pytest.mark.parametrize("vectorised", [True, False])
def test_rows_are_those_of_one_backward_pass_each(chunk_size, vectorised):
    model = net()
    outputs = model(batch(0)[0])
    outputs = outputs if vectorised else Doubled.apply(outputs)
    params = trained(model)
    rows = jacobian(outputs, params, chunk_size)
    assert [row is None for row in rows] == [p is model.unused for p in params]
    wanted = reference_ekf.jacobian(outputs, [p for p in params if p is not model.unused])
    result = torch.cat([row for row in rows if row is not None], dim=1)
    torch.testing.assert_close(result, wanted, rtol=1e-14, atol=1e-15)
