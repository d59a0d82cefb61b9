"""Runs as Slurm jobs, through submitit; what they ask of Slurm stands in configs/hydra/launcher/slurm.yaml alone.

    python train.py -m hydra/launcher=slurm num_gpus=8 ...      Hydra's submitit launcher reads that file
    scripts/reproduce.py --launcher slurm                       this module reads the same file

Jobs are found again by their run folder: `<output_root>/slurm/jobs.jsonl` holds a line {job, run} for every job that
was submitted, and squeue tells which of them are still there. How a run ended stands in its record, nowhere else.
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
from koala.runs.composing import config_error, hydra_config

JOBS = Path("slurm/jobs.jsonl")
# Names that submitit knows for every scheduler; the rest are Slurm's own and get its prefix.
COMMON = set("name nodes tasks_per_node gpus_per_node cpus_per_task mem_gb timeout_min stderr_to_stdout".split())
# What a job asks of sbatch that no site has a say in.
OURS = set("job-name output error open-mode signal requeue wckey".split())


class NoAnswer(ConfigError):
    """Slurm does not tell what it has, at least not now."""


def train(overrides: Sequence[str]) -> dict:
    """What a job does, once on each of its ranks: the run that `python train.py *overrides` is. Returns its record."""
    typed = [text for text in overrides if text != "rerun=true"]  # typed again, that would move this run aside
    return launch(compose(list(overrides)), shlex.join(["python", "train.py", *typed]))


def parameters(overrides: Sequence[str], options: Mapping[str, object] | None = None) -> dict:
    """What the run that `overrides` describe asks of Slurm: slurm.yaml with nodes, tasks and GPUs filled in.

    Args:
        overrides: those of train.py; `num_gpus`, `num_nodes` and `cpu_procs` among them count here.
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


def executor(asked: Mapping[str, object]) -> submitit.AutoExecutor:
    """A submitit executor for jobs with the `parameters` asked for.

    Raises:
        ConfigError: this machine cannot submit to Slurm.
    """
    if not shutil.which("sbatch"):
        raise ConfigError("launcher", "slurm", "no sbatch here", valid="this on a machine that submits to Slurm")
    asked = {key: value for key, value in asked.items() if key != "_target_" and value is not None}
    made = submitit.AutoExecutor(
        asked.pop("submitit_folder"), cluster="slurm", slurm_max_num_timeout=asked.pop("max_num_timeout")
    )
    made.update_parameters(**{key if key in COMMON else f"slurm_{key}": value for key, value in asked.items()})
    return made


def submit(runs: Sequence[Sequence[str]], options: Mapping[str, object] | None = None) -> list[str]:
    """Submits every run that is not in the queue yet, and returns the ids of the new jobs, in the order of their runs.

    Runs that ask the same of Slurm form one job array, at most `array_parallelism` of which run at a time.

    Args:
        runs: lists of train.py's overrides.
        options: see `parameters`.

    Raises:
        ConfigError: a run or an option is bad, or Slurm does not answer; then nothing was submitted. Or Slurm refuses
            what one of them asks for.
    """
    configs = [compose(list(run)) for run in runs]
    asked = [parameters(run, options) for run in runs]
    present = queue(configs)
    new = [index for index, cfg in enumerate(configs) if run_dir(cfg) not in present]
    ids = {}
    while new:
        first = asked[new[0]]
        together = [index for index in new if asked[index] == first]
        try:
            jobs = executor(first).map_array(train, [list(runs[index]) for index in together])
        except FailedJobError as error:
            raise refusal(error) from error
        for index, job in zip(together, jobs, strict=True):
            path = Path(configs[index].output_root) / JOBS
            path.parent.mkdir(parents=True, exist_ok=True)
            records.append_row(path, {"job": job.job_id, "run": str(run_dir(configs[index]).resolve())})
            ids[index] = job.job_id
        new = [index for index in new if index not in together]
    return [ids[index] for index in sorted(ids)]


def refusal(error: FailedJobError) -> ConfigError:
    """Why sbatch took no job: its own words, what it was asked for, and what there is."""
    _, script = error.__cause__.cmd
    asked = re.findall(r"^#SBATCH --(.*)$", Path(script).read_text(encoding="utf-8"), re.MULTILINE)
    chosen = ", ".join(text for text in asked if text.partition("=")[0] not in OURS)
    said = "; ".join(line.removeprefix("sbatch: error: ") for line in str(error).splitlines())
    there = "; ".join(_ask("sinfo", "--noheader", "--format=%R: %D nodes of %c CPUs, gres %G, time %l"))
    return ConfigError("Slurm", None, f"refuses {chosen} ({said})", valid=there)


def queue(configs: Sequence[DictConfig]) -> dict[Path, tuple[str, str]]:
    """{run folder: (job, state)} of those runs that wait or run in Slurm: PENDING, RUNNING, COMPLETING, ...

    Raises:
        NoAnswer: squeue failed.
    """
    submitted: dict[str, str] = {}
    for root in {cfg.output_root for cfg in configs}:
        submitted |= {row["run"]: row["job"] for row in records.read_rows(Path(root) / JOBS)}
    here = {run_dir(cfg): submitted.get(str(run_dir(cfg).resolve())) for cfg in configs}
    states = _states() if any(here.values()) else {}
    return {path: (job, states[job]) for path, job in here.items() if job in states}


def _states() -> dict[str, str]:
    """{job: state} of this user's jobs in Slurm's queue, an array's tasks one by one."""
    return dict(line.split() for line in _ask("squeue", "--me", "--array", "--noheader", "--format=%i %T"))


def _ask(*command: str) -> list[str]:
    """The lines that one of Slurm's programs answers.

    Raises:
        NoAnswer: it failed.
    """
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (subprocess.CalledProcessError, OSError) as error:
        said = " ".join((getattr(error, "stderr", "") or str(error)).split())
        raise NoAnswer("Slurm", None, f"does not answer {command[0]}: {said}", valid="where it does") from None
