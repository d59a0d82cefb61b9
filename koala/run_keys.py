"""Every top-level key of a run: type, range, default, help, and whether it can change a number. Needs no torch, so that
tables can tell runs apart without."""

from typing import Annotated, Any, Literal

from pydantic import Field

from koala.schema import Schema

Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]


def key(default: Any, text: str, *, material: bool = True, **limits: Any) -> Any:
    """A key of a run: its default, its line of help, and its range; `material`: whether it can change a number."""
    return Field(default, description=text, json_schema_extra={"material": material}, **limits)


class Run(Schema):
    """Every top-level key of a run; `python train.py --help` prints this list."""

    data: dict[str, Any] = key(..., "data set (group)")
    model: dict[str, Any] = key(..., "model (group; the default depends on data)")
    optim: dict[str, Any] = key(..., "optimizer (group)")
    schedule: dict[str, Any] = key(..., "learning-rate schedule (group; the default depends on data)")
    wrapper: dict[str, Any] = key(..., "around the optimizer (group)")
    logger: dict[str, Any] = key(..., "mirror of the records (group)", material=False)

    seed: Count = key(1, "weights, order of the samples, augmentation, dropout", material=False)
    epochs: Positive = key("${data.epochs}", "passes over the training set")
    max_steps: Positive | None = key(None, "stop after this number of optimizer steps, whatever epochs is")
    batch_size: Positive = key("${data.batch_size}", "global: over all ranks and accumulation steps")
    accumulation: Positive = key(1, "number of micro-batches that each rank's batch is split into")
    eval_batch_size: Positive = key(
        "${data.eval_batch_size}", "of evaluation, per rank; does not change the metrics", material=False
    )
    grad_clip: float | None = key("${data.grad_clip}", "largest global gradient norm, applied before the step", gt=0)
    select: Literal["last", "best-val"] = key(
        "${data.select}", "model that is reported: last | best-val (then tested once)"
    )
    targets: dict[str, float] | None = key(
        None, "{metric: value}; the epoch, step and seconds of first reaching each are recorded", material=False
    )
    objective: str = key("val_loss", "metric of the final row that a sweeper minimises", material=False)

    ranks: Literal["auto"] | Positive = key(
        "auto", "number of ranks that the numbers belong to: auto (those of now) | n (resume a run of n ranks)"
    )
    num_gpus: Literal["auto"] | Count = key("auto", "GPUs on each node: auto (all) | 0 (CPU) | n", material=False)
    num_nodes: Positive = key(1, "machines; above 1 start with torchrun, srun or a Slurm launcher", material=False)
    cpu_procs: Positive = key(1, "ranks when num_gpus=0", material=False)
    strategy: Literal["ddp", "fsdp"] = key("ddp", "how ranks share the model: ddp | fsdp", material=False)
    precision: Literal["fp32", "tf32", "bf16", "fp64"] = key(
        "fp32", "fp32 | tf32 (GPUs) | bf16 (autocast) | fp64 (for exact comparisons)"
    )
    sync_bn: bool = key(False, "BatchNorm normalises over the samples of all ranks")
    compile: bool = key(False, "torch.compile the model", material=False)
    channels_last: bool = key(
        True, "memory layout of image models; on CPUs only where its kernels are safe", material=False
    )
    deterministic: bool = key(False, "torch's deterministic algorithms only", material=False)

    output_root: str = key("outputs", "run folders go here", material=False, min_length=1)
    data_root: str = key("data", "caches of decoded data sets go here", material=False, min_length=1)
    eval_every: Positive = key(1, "epochs between evaluations")
    checkpoint_every: float = key(
        60.0, "seconds of training between checkpoints; 0: at every step", material=False, ge=0
    )
    checkpoint_async: Literal["auto", True, False] = key(
        "auto", "write checkpoints beside training: auto (on GPUs) | true | false", material=False
    )
    log_every: Positive = key(20, "steps between log lines (each waits for the device)", material=False)
    timeout: float = key(
        1800.0, "seconds after which ranks that wait for a hung one give up", material=False, gt=0, le=1e8
    )
    max_restarts: Count = key(
        0, "times that workers are started again, from the checkpoint, after one died", material=False
    )
    resume: bool = key(True, "resume from the last checkpoint; false: refuse if there is one", material=False)
    rerun: bool = key(False, "move a finished or unfinished run aside and start again", material=False)


# Keys of models that name a local file or folder, or something of a hub.
PRETRAINED = ("pretrained", "weights", "base.pretrained")
GROUPS = tuple(name for name, field in Run.model_fields.items() if field.is_required())
DEFAULTS = {name: field.default for name, field in Run.model_fields.items() if not field.is_required()}
IMMATERIAL = frozenset(name for name, field in Run.model_fields.items() if not field.json_schema_extra["material"])
