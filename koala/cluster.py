"""Runs as Slurm jobs, through submitit. Their options stand in configs/hydra/launcher/slurm.yaml alone.

    python train.py -m hydra/launcher=slurm num_gpus=8 ...      Hydra's submitit launcher reads that file
    scripts/reproduce.py --launcher slurm                       this module reads the same file

The file `<output_root>/slurm/jobs.jsonl` has a line {job, run folder} for every submitted job; squeue says which of
them are still queued or running. Whether a run finished, its record says.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import submitit
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from submitit.core.utils import FailedJobError

from koala import records
from koala.errors import ConfigError
from koala.runs import compose, launch, run_dir
from koala.runs.overrides import config_error, hydra_config

JOBS = Path("slurm/jobs.jsonl")
# Options that submitit has for every scheduler; all others get the prefix slurm_.
ANY_SCHEDULER = set("name nodes tasks_per_node gpus_per_node cpus_per_task mem_gb timeout_min stderr_to_stdout".split())
# Options of sbatch that do not depend on the cluster.
SAME_EVERYWHERE = set("job-name output error open-mode signal requeue wckey".split())


class NoAnswer(ConfigError):
    """A command of Slurm, such as squeue, failed; it may work later."""


def train(overrides: Sequence[str]) -> dict:
    """Executes `python train.py *overrides` as one rank of a job, and returns the run's record."""
    recorded = [text for text in overrides if text != "rerun=true"]  # who repeats the command would discard this run
    return launch(compose(list(overrides)), shlex.join(["python", "train.py", *recorded]))


def parameters(overrides: Sequence[str], options: Mapping[str, object] | None = None) -> dict:
    """Slurm options of the run that `overrides` describe: slurm.yaml with nodes, tasks and GPUs filled in.

    Args:
        overrides: those of train.py; `num_gpus`, `num_nodes` and `cpu_procs` decide the job's size.
        options: keys of slurm.yaml to change, such as {"partition": "gpu", "timeout_min": 600}.

    Raises:
        ConfigError: an unknown or ill-typed option, or num_gpus=auto.
    """
    chosen = ["hydra/launcher=slurm"] + [f"hydra.launcher.{key}={value}" for key, value in (options or {}).items()]
    cfg = hydra_config([*overrides, *chosen], return_hydra_config=True)
    try:
        return OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    except OmegaConfBaseException as error:
        raise config_error(error) from error


def executor(options: Mapping[str, object]) -> submitit.AutoExecutor:
    """A submitit executor for jobs with these `parameters`.

    Raises:
        ConfigError: this machine cannot submit to Slurm.
    """
    if not shutil.which("sbatch"):
        raise ConfigError("launcher", "slurm", "no sbatch here", valid="this on a machine that submits to Slurm")
    options = {key: value for key, value in options.items() if key != "_target_" and value is not None}
    folder, restarts = options.pop("submitit_folder"), options.pop("max_num_timeout")
    slurm = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=restarts)
    slurm.update_parameters(
        **{key if key in ANY_SCHEDULER else f"slurm_{key}": value for key, value in options.items()}
    )
    return slurm


def submit(runs: Sequence[Sequence[str]], options: Mapping[str, object] | None = None) -> list[str]:
    """Submits every run that is not in the queue yet, and returns the ids of the new jobs, in the order of their runs.

    Runs with equal Slurm options form one job array; at most `array_parallelism` of its jobs run at a time.

    Args:
        runs: lists of train.py's overrides.
        options: see `parameters`.

    Raises:
        ConfigError: a run or an option is bad, or squeue fails; then nothing was submitted. Or sbatch rejects the
            options of a run; then the job arrays before it are submitted.
    """
    configs = [compose(list(run)) for run in runs]
    wanted = [parameters(run, options) for run in runs]
    queued = queue(configs)
    new = [index for index, cfg in enumerate(configs) if run_dir(cfg) not in queued]
    ids = {}
    while new:
        array = [index for index in new if wanted[index] == wanted[new[0]]]
        try:
            jobs = executor(wanted[new[0]]).map_array(train, [list(runs[index]) for index in array])
        except FailedJobError as error:
            raise submission_error(error) from error
        for index, job in zip(array, jobs, strict=True):
            path = Path(configs[index].output_root) / JOBS
            path.parent.mkdir(parents=True, exist_ok=True)
            records.append_row(path, {"job": job.job_id, "run": str(run_dir(configs[index]).resolve())})
            ids[index] = job.job_id
        new = [index for index in new if index not in array]
    return [ids[index] for index in sorted(ids)]


def submission_error(error: FailedJobError) -> ConfigError:
    """One message for a job that sbatch rejected: the job's options, sbatch's reason, and the cluster's partitions."""
    _, script = error.__cause__.cmd
    options = re.findall(r"^#SBATCH --(.*)$", Path(script).read_text(encoding="utf-8"), re.MULTILINE)
    chosen = ", ".join(text for text in options if text.partition("=")[0] not in SAME_EVERYWHERE)
    reason = "; ".join(line.removeprefix("sbatch: error: ") for line in str(error).splitlines())
    partitions = "; ".join(_lines("sinfo", "--noheader", "--format=%R: %D nodes of %c CPUs, gres %G, time %l"))
    return ConfigError("Slurm", None, f"refuses {chosen} ({reason})", valid=partitions)


def queue(configs: Sequence[DictConfig]) -> dict[Path, tuple[str, str]]:
    """{run folder: (job, state)} of the runs that are in Slurm's queue; a state is PENDING, RUNNING, COMPLETING, ...

    Raises:
        NoAnswer: squeue failed.
    """
    submitted: dict[str, str] = {}
    for root in {cfg.output_root for cfg in configs}:
        submitted |= {row["run"]: row["job"] for row in records.read_rows(Path(root) / JOBS)}
    jobs = {run_dir(cfg): submitted.get(str(run_dir(cfg).resolve())) for cfg in configs}
    states = _states() if any(jobs.values()) else {}
    return {folder: (job, states[job]) for folder, job in jobs.items() if job in states}


def _states() -> dict[str, str]:
    """{job: state} of this user's jobs in Slurm's queue; each task of an array is a job."""
    return dict(line.split() for line in _lines("squeue", "--me", "--array", "--noheader", "--format=%i %T"))


def _lines(*command: str) -> list[str]:
    """Output of one of Slurm's commands, by lines.

    Raises:
        NoAnswer: it failed.
    """
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (subprocess.CalledProcessError, OSError) as error:
        reason = " ".join((getattr(error, "stderr", "") or str(error)).split())
        raise NoAnswer("Slurm", None, f"does not answer {command[0]}: {reason}", valid="where it does") from None
