import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from koala.optim import portable


@pytest.fixture(params=[False, True, "reference"], ids=["portable", "fused", "reference"])
def fused(request, monkeypatch):
    """Each implementation of the CPU; tensors of a test's size are cut into blocks where blocks are used."""
    monkeypatch.setattr(portable, "BLOCK", 10)
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Sums do not depend on how many threads the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_ranks():
    """This process is one of two, of which the other is not there."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()
