"""One model over its ranks: whole on each (DDP) or sharded (FSDP2); the state of either goes into the other."""

from collections import Counter

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from koala.training.ranks import Ranks


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
    """A copy of the model's state on the CPU: of all of it, or of this rank's shards."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}


def load_model_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts a state back; of a whole one, a sharded module takes its shards."""
    here = module.state_dict()
    module.load_state_dict({name: _cut(tensor, here.get(name)) for name, tensor in state.items()})


def _cut(value, like):
    """A whole tensor sharded as `like` is, if that is sharded; else `value`."""
    if isinstance(like, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict:
    """The optimizer's state: by name of parameter when sharded, else as the optimizer gives it."""
    return get_optimizer_state_dict(module, optimizer) if is_sharded(module) else optimizer.state_dict()


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: dict, named: bool) -> None:
    """Puts back a state by name of parameter (`named`), or one that a whole optimizer gave."""
    if named or is_sharded(module):
        set_optimizer_state_dict(module, optimizer, state if named else _named(module, optimizer, state))
    else:
        optimizer.load_state_dict(state)


def _named(module: nn.Module, optimizer: Optimizer, state: dict) -> dict:
    """A whole optimizer's state, by number of parameter, as one by name, cut as this optimizer is sharded."""
    here = get_optimizer_state_dict(module, optimizer)
    names = [name for group in here["param_groups"] for name in group["params"]]
    return {
        "state": {
            names[number]: {key: _cut(value, here["state"][names[number]].get(key)) for key, value in own.items()}
            for number, own in state["state"].items()
        },
        "param_groups": [
            group | {"params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
