"""One model over its ranks: replicated (DDP) or sharded (FSDP2); the state of either can be loaded by the other."""

import contextlib
from collections import Counter

import torch
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from koala.training.ranks import Ranks


def distribute(module: nn.Module, ranks: Ranks, strategy: str, compiled: bool = False) -> nn.Module:
    """What to call in training: `module` itself on one rank or sharded in place, else its DDP wrapper.

    Args:
        compiled: have torch.compile compile it, in place, so that names of parameters stay as they are.
    """
    sharded = ranks.world > 1 and strategy == "fsdp"
    units = _units(module) if sharded else []
    if compiled:
        for part in units or [module]:  # a unit gathers its weights outside of what is compiled
            # Units of one class differ in width, which torch would take for a length that varies, and fail over.
            part.compile(dynamic=False if units else None)
    if ranks.world == 1:
        return module
    if sharded:
        # The mesh names the device: on a machine with GPUs torch would choose them for ranks on the CPU as well.
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        # Autocast decides what is computed in bf16, exactly as without sharding; gradients are summed in float32. With
        # param_dtype=bfloat16 half would be gathered, but norms' weights rounded, and BatchNorm mixes no dtypes.
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        for part in [*units, module]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
        return module
    if ranks.device.type == "cpu":
        # DDP lays its buckets out anew after the first step, and CPU sums depend on alignment: gradients that are views
        # of buckets would make a resumed run differ in the last bits from one left alone.
        return DistributedDataParallel(module)
    return DistributedDataParallel(module, device_ids=[ranks.device], gradient_as_bucket_view=True)


def gradient_sync(net: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """The context of one of several passes that make a gradient, which ranks sum in the `last` one only."""
    if isinstance(net, DistributedDataParallel) and not last:
        return net.no_sync()
    if is_sharded(net):
        net.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def _units(module: nn.Module) -> list[nn.Module]:
    """The parts to shard one by one: children, or the items of a list of them, whose parameters are theirs alone.

    Parts with tied weights are left to the root, since one parameter cannot be sharded twice.
    """
    parts = [part for child in module.children() for part in (child if isinstance(child, nn.ModuleList) else [child])]
    owners = Counter(parameter for part in parts for parameter in part.parameters())
    weights = {part: list(part.parameters()) for part in parts}
    return [part for part, tensors in weights.items() if tensors and all(owners[tensor] == 1 for tensor in tensors)]


class SyncBatchNorm(_BatchNorm):
    """BatchNorm whose training statistics are those of all ranks' samples, on any device.

    torch.nn.SyncBatchNorm is for GPUs only. Ranks may hold different numbers of samples.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalises [B, C, ...] by mean and variance of each channel over all ranks; evaluation as BatchNorm's."""
        if not self.training:
            return super().forward(inputs)
        dims = [0, *range(2, inputs.dim())]
        values = inputs.double()  # a mean of squares less the square of a mean loses half the digits
        count = values.new_full((1,), values.numel() / values.shape[1])
        sums = differentiable.all_reduce(torch.cat([count, values.sum(dims), values.square().sum(dims)]))
        count, total, squares = sums[0].detach(), *sums[1:].chunk(2)
        mean = total / count
        variance = squares / count - mean.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        shape = (1, -1, *[1] * (inputs.dim() - 2))
        scale = self.weight * (variance + self.eps).rsqrt()
        return (values * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(inputs.dtype)

    def _check_input_dim(self, inputs: Tensor) -> None:
        """Any number of dimensions."""


def synchronised(module: nn.Module, ranks: Ranks) -> nn.Module:
    """`module` with every BatchNorm normalising over the samples of all ranks."""
    if ranks.world == 1:
        return module
    if ranks.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.__class__ = SyncBatchNorm  # same parameters, buffers and names
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether `distribute` sharded it."""
    return isinstance(module, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cpu_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a model's state on the CPU; of a sharded model, of this rank's shards."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def sharded_for(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A model's state as `module` takes it: a sharded module takes its shards of unsharded tensors."""
    like = module.state_dict()
    return {name: _sharded_like(tensor, like.get(name)) for name, tensor in state.items()}


def _sharded_like(value, like):
    """`value` sharded as `like` is, if that is sharded; else `value`."""
    if isinstance(like, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict:
    """The optimizer's state: by name of parameter when sharded, else as the optimizer gives it."""
    return get_optimizer_state_dict(module, optimizer) if is_sharded(module) else optimizer.state_dict()


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: dict, named: bool) -> None:
    """Loads a state by name of parameter (`named`), or one that an unsharded optimizer gave."""
    if named or is_sharded(module):
        set_optimizer_state_dict(module, optimizer, state if named else _named(module, optimizer, state))
    else:
        optimizer.load_state_dict(state)


def _named(module: nn.Module, optimizer: Optimizer, state: dict) -> dict:
    """An unsharded optimizer's state, by number of parameter, as one by name, sharded as this optimizer is."""
    like = get_optimizer_state_dict(module, optimizer)
    names = [name for group in like["param_groups"] for name in group["params"]]
    return {
        "state": {
            names[number]: {
                key: _sharded_like(value, like["state"][names[number]].get(key)) for key, value in values.items()
            }
            for number, values in state["state"].items()
        },
        "param_groups": [
            group | {"params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
