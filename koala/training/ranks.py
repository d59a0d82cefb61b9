"""Ranks: the processes of a run, their devices, and their collectives."""

import contextlib
import datetime
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from koala.data.base import part
from koala.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process's rank among those of a run. Collectives do nothing when there is one rank."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes: records, checkpoints, W&B, progress."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        largest = torch.tensor(value, device=self.device)
        if self.world > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            dist.barrier()

    def broadcast_object(self, value):
        """Rank 0's `value` on every rank."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Gives every rank the main rank's buffers (BatchNorm statistics), as DDP does before each forward."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def check_replicas(self, module: nn.Module) -> None:
        """Raises RuntimeError unless the parameters of all ranks are the same bits: ranks drift apart silently."""
        if self.world == 1:
            return
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}
        digest = torch.stack(
            [
                parameter.detach().contiguous().view(bits[parameter.element_size()]).sum(dtype=torch.int64)
                for parameter in module.parameters()
            ]
        )
        lowest, highest = digest.clone(), digest
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        if differing := int((lowest != highest).sum()):
            raise RuntimeError(
                f"the ranks' replicas differ in {differing} of {len(digest)} parameters; an optimizer that reads "
                "the loss must be given the loss of the whole batch, not of its rank"
            )

    def aside(self, timeout: float) -> dist.ProcessGroup | None:
        """Another group of the same ranks, on their hosts: threads must not share one, whose collectives have an order.

        Args:
            timeout: seconds.
        """
        if self.world == 1:
            return None
        return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))

    def gather_objects(self, value, group: dist.ProcessGroup | None = None) -> list:
        """Every rank's `value`, on every rank."""
        gathered = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(gathered, value, group)
        return gathered

    def gather_columns(self, tensor: Tensor) -> Tensor:
        """Tensors [layers, columns of a rank, width] of all ranks as one [layers, columns, width] on the CPU."""
        return torch.cat(self.gather_objects(tensor.cpu()), dim=1)

    def local_columns(self, tensor: Tensor) -> Tensor:
        """The inverse of `gather_columns`, for this number of ranks."""
        return tensor[:, part(tensor.shape[1], self.rank, self.world)].to(self.device).contiguous()


# Steps of a Slurm job that are shells: interactive (salloc), and the batch script itself.
SHELLS = ("4294967290", "4294967291")
PORTS = range(20000, 32768)  # below those that systems give to whoever connects
STRIDE = 4001  # prime to their number, so that neighbouring jobs and the steps of a job are far apart
BY_HAND = "to start one by hand within a launcher's shell: unset RANK WORLD_SIZE SLURM_PROCID"
PATIENCE = 10.0  # seconds in which ranks that are started together have all come

ALONE = Ranks(0, 1, torch.device("cpu"))


def launched_rank() -> dict[str, int] | None:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun, or else srun, set them; None when started by hand.

    Raises:
        ConfigError: one of a launcher's variables is no number; a shell profile or a job script has set it.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return {key: _number(key, "0") for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # srun gives each task SLURM_PROCID; inside sbatch alone SLURM_STEP_ID is not set and one process is all there is.
    shell = "SLURM_PTY_PORT" in os.environ or os.environ.get("SLURM_STEP_ID") in SHELLS  # of a job, typed in by hand
    tasks = _number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS", "1")
    if shell or tasks == 1 or not {"SLURM_STEP_ID", "SLURM_PROCID"} <= set(os.environ):
        return None
    return {"RANK": _number("SLURM_PROCID"), "WORLD_SIZE": tasks, "LOCAL_RANK": _number("SLURM_LOCALID")}


def _number(variable: str, default: str | None = None) -> int:
    text = os.environ.get(variable, default)
    if text is None or not text.strip().isdecimal():
        valid = "whole numbers, as a launcher sets them all (unset them all to start by hand)"
        raise ConfigError(variable, text, "is not what a launcher sets", valid=valid)
    return int(text)


def ranks_now(cfg: DictConfig) -> int:
    """How many ranks take part in a run that is started now.

    Raises:
        ConfigError: the GPUs of other nodes are not known here.
    """
    if launched := launched_rank():
        return launched["WORLD_SIZE"]
    if cfg.num_nodes > 1 and cfg.num_gpus == "auto":
        raise ConfigError("num_gpus", "auto", "one node cannot know the others' GPUs", valid="those of each node")
    return (gpus_per_node(cfg) or cfg.cpu_procs) * cfg.num_nodes


def _export(environment: dict[str, int]) -> None:
    """Sets what torch's env:// rendezvous reads, for srun (torchrun has set it). Every step of a job has its port."""
    os.environ.update({key: str(value) for key, value in environment.items()})
    if "MASTER_ADDR" not in os.environ:
        nodes = _answer("scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split()
        job, step = (int(os.environ[name]) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        os.environ["MASTER_ADDR"] = nodes[0]
        os.environ.setdefault("MASTER_PORT", str(PORTS.start + (job + STRIDE * step) % len(PORTS)))


def _answer(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
        valid = "MASTER_ADDR and MASTER_PORT, the first rank's host and a free port of it"
        raise ConfigError("Slurm", None, f"does not name its nodes ({reason})", valid=valid) from None


def gpus_per_node(cfg: DictConfig) -> int:
    """`num_gpus` as a number; "auto" is every GPU of this machine."""
    return torch.cuda.device_count() if cfg.num_gpus == "auto" else cfg.num_gpus


def _unused_part(store: dist.Store, rank: int, world: int) -> dist.Store:
    """The part of `store` that no ranks before these have written to.

    An elastic agent keeps one store while it starts its workers again, and what the dead ones left there (addresses to
    connect to) looks as if their successors had written it. How often they were started does not tell workers apart:
    agents on several nodes count on their own. So rank 0 draws a name and sends it on request, until all have it.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        confirmed = 0
        while confirmed < world - 1:
            sender, _, received = store.queue_pop("koala/requests").decode().partition(" ")
            if received == name:
                confirmed += 1
            else:  # the sender may be dead: nobody reads the answer then
                store.set(f"koala/answer/{sender}", name)
    else:
        sender = name
        store.queue_push("koala/requests", sender)
        name = store.get(f"koala/answer/{sender}").decode()
        store.queue_push("koala/requests", f"{sender} {name}")
    return dist.PrefixStore(name, store)


def device_index(local: int, visible: int) -> int:
    """Which of the `visible` GPUs belongs to a node's `local`-th rank: its own, or the only one that it was given.

    Raises:
        ConfigError: there are several, but fewer than ranks.
    """
    if visible == 1:  # srun --gpus-per-task=1, or CUDA_VISIBLE_DEVICES for each task
        return 0
    if local >= visible:
        reason = f"rank {local} of this node has no GPU"
        raise ConfigError("num_gpus", visible, reason, valid="as many ranks as GPUs are visible")
    return local


def _meet(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """The ranks' store, this rank and their number, once all have come.

    Raises:
        ConfigError: they do not, or another process has the port.
    """
    try:
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        return _unused_part(store, rank, world), rank, world
    except (dist.DistError, RuntimeError) as error:
        port = os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise ConfigError("MASTER_PORT", port, "another process of this node has it", valid="a free one") from None
        reason = f"the ranks did not all come within timeout={timeout.total_seconds():g} s"
        raise ConfigError("MASTER_ADDR", f"{os.environ['MASTER_ADDR']}:{port}", f"{reason}; {BY_HAND}") from None


@contextlib.contextmanager
def _reporting_long_waits(environment: dict[str, int]) -> Iterator[None]:
    """Prints a line if the other ranks take long: one that was started by hand waits for none that will ever come."""
    rank, world = environment["RANK"], environment["WORLD_SIZE"]
    text = f"rank {rank} waits for {world - 1} other{'s' * (world > 2)} of {world} ranks; {BY_HAND}"
    timer = threading.Timer(PATIENCE, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _nccl_options(timeout: datetime.timedelta):
    """Reductions of gradients go before queued computation: what waits for them is the end of the step."""
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream, options._timeout = True, timeout
    return options


def join(cfg: DictConfig) -> Ranks:
    """Joins the process group that the environment describes, or stands alone."""
    environment = launched_rank()
    local_rank = environment["LOCAL_RANK"] if environment else 0
    on_gpu = gpus_per_node(cfg) > 0
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", device_index(local_rank, torch.cuda.device_count()))
    if on_gpu:
        torch.cuda.set_device(device)
    if environment is None or environment["WORLD_SIZE"] == 1:
        return Ranks(0, 1, device)
    if "MASTER_ADDR" not in os.environ:
        _export(environment)
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=cfg.timeout)
        with _reporting_long_waits(environment):
            store, rank, world = _meet(timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",  # objects and checkpoints go beside the GPUs' queue
            store=store,
            rank=rank,
            world_size=world,
            timeout=timeout,
            device_id=device if on_gpu else None,
            pg_options=_nccl_options(timeout) if on_gpu else None,
        )
    return Ranks(dist.get_rank(), dist.get_world_size(), device)
