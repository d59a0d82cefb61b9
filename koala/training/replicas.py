"""One model over its ranks: whole on each (DDP) or sharded (FSDP2), with the same whole state dicts either way."""

from collections import Counter

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from koala.training.ranks import Ranks

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def distribute(module: nn.Module, ranks: Ranks, strategy: str) -> nn.Module:
    """What to call in training: `module` itself on one rank or sharded in place, else its DDP wrapper."""
    if ranks.world == 1:
        return module
    if strategy == "fsdp":
        for unit in _units(module):
            fully_shard(unit)
        return fully_shard(module)
    if ranks.device.type == "cpu":
        # DDP lays its buckets out anew after the first step, and CPU sums depend on alignment: gradients that are views
        # of buckets would make a resumed run differ in the last bits from one left alone.
        return DistributedDataParallel(module)
    return DistributedDataParallel(module, device_ids=[ranks.device], gradient_as_bucket_view=True)


def _units(module: nn.Module) -> list[nn.Module]:
    """The parts to shard one by one: children, or the items of a list of them, whose parameters are theirs alone.

    Parts with tied weights are left to the root, since one parameter cannot be sharded twice.
    """
    parts = [part for child in module.children() for part in (child if isinstance(child, nn.ModuleList) else [child])]
    owners = Counter(parameter for part in parts for parameter in part.parameters())  # a part names its own once
    weights = {part: list(part.parameters()) for part in parts}
    return [part for part, own in weights.items() if own and all(owners[parameter] == 1 for parameter in own)]


def is_sharded(module: nn.Module) -> bool:
    """Whether `distribute` sharded it."""
    return isinstance(module, FSDPModule)


def model_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole model's state on the CPU (a collective when it is sharded)."""
    if is_sharded(module):
        return get_model_state_dict(module, options=WHOLE)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}


def load_model_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts a whole state back, each rank keeping its shard."""
    if is_sharded(module):
        # What `model_state` gathered is on rank 0 alone.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
        set_model_state_dict(module, state, options=options)
    else:
        module.load_state_dict(state)


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict:
    """The optimizer's whole state; by name of parameter when sharded, else as the optimizer gives it."""
    return get_optimizer_state_dict(module, optimizer, options=WHOLE) if is_sharded(module) else optimizer.state_dict()


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: dict) -> None:
    """The inverse of `optimizer_state`."""
    if is_sharded(module):
        set_optimizer_state_dict(module, optimizer, state, options=WHOLE)
    else:
        optimizer.load_state_dict(state)
