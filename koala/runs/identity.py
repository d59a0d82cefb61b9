"""Which run a configuration is: a hash of everything that changes its numbers, the folder of that name, and what its
record says of who made it."""

import datetime
import hashlib
import json
import shlex
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from koala import data, fingerprint, numerics, records
from koala.runs.schema import IMMATERIAL, Recipe
from koala.training.machine import device_name
from koala.training.ranks import Ranks, gpus_per_node, placed

# Where the data is from, which its fingerprint stands for, and how many processes decode it.
IMMATERIAL_DATA = {"path", "hub", "hub_config", "hub_revision", "workers", *Recipe.model_fields}
# Which of several implementations of the same update is used.
IMMATERIAL_OPTIM = {"_partial_", "fused", "foreach"}


def at_work(cfg: DictConfig) -> int:
    """How many ranks take part in a run that is started now, with what there is now."""
    place = placed()
    return place["WORLD_SIZE"] if place else (gpus_per_node(cfg) or cfg.cpu_procs) * cfg.num_nodes


def material(config: dict) -> dict:
    """What of a resolved configuration can change the numbers of a run, the content of its data and the seed apart."""
    matter = {key: value for key, value in config.items() if key not in IMMATERIAL}
    matter["data"] = {key: value for key, value in matter["data"].items() if key not in IMMATERIAL_DATA}
    matter["optim"] = {key: value for key, value in matter["optim"].items() if key not in IMMATERIAL_OPTIM}
    return matter


def config_hash(cfg: DictConfig) -> str:
    """12 hexadecimal digits that name all in `cfg` that changes the numbers, but the seed, which is a folder.

    In it are the number of ranks (BatchNorm's statistics and dropout differ with it), accumulation, precision and the
    content of the data and of a folder of embeddings; not in it is what changes the rounding of sums at most, or
    nothing.
    """
    matter = material(OmegaConf.to_container(cfg, resolve=True))
    matter["data"]["fingerprint"] = data.fingerprint(cfg.data, cfg.data_root)
    if (weights := Path(cfg.model.get("pretrained") or "")).name and weights.is_dir():  # else the name of a hub's
        files = [(file.name, file) for file in sorted(weights.iterdir()) if file.is_file()]
        matter["model"]["pretrained"] = data.digest(files, Path(cfg.data_root))
    text = json.dumps(matter, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_name(cfg: DictConfig) -> str:
    """data/model/optim, the human part of a run's identity."""
    return f"{cfg.data.name}/{cfg.model.name}/{cfg.optim.name}"


def run_dir(cfg: DictConfig) -> Path:
    """The folder that belongs to this run and no other."""
    return Path(cfg.output_root) / run_name(cfg) / config_hash(cfg) / f"seed{cfg.seed}"


def now() -> str:
    """UTC, ISO 8601, seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def opening(cfg: DictConfig, ranks: Ranks, command: str | None) -> records.Opening:
    """What a record says before anything is measured."""
    return {
        "schema": records.SCHEMA,
        "name": run_name(cfg),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "config_hash": config_hash(cfg),
        "seed": cfg.seed,
        "precision": cfg.precision,
        "ranks": cfg.ranks,
        "world_size": ranks.world,
        "data": {
            "name": cfg.data.name,
            "fingerprint": data.fingerprint(cfg.data, cfg.data_root),
            "revision": cfg.data.get("hub_revision"),
        },
        "device": device_name(ranks.device),
        "versions": fingerprint.versions(),
        "git": fingerprint.git(),
        "command": command or shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": now(),
        "history": records.METRICS,
        "segments": [],
    }


def segment(cfg: DictConfig, ranks: Ranks, opening: records.Opening) -> dict:
    """What is known of this process's part of a run when it begins (records.Segment); the trainer adds the rest."""
    return {
        **{key: opening[key] for key in ("versions", "git", "device")},
        "numerics": numerics.VERSION,
        "threads": torch.get_num_threads(),
        "compile": cfg.compile,
        "ranks": ranks.world,
    }


def remarks(record: records.Record) -> list[str]:
    """What a person who is given this record should know: it is of other versions, or of other ranks than it claims."""
    said, name = [], f"{record['name']} seed {record['seed']}"
    if others := _other_versions(record):
        said.append(f"{name}: this record was made by {', '.join(others)}; rerun=true makes it again with what is here")
    parts = [part for part in record.get("segments", []) if part["ranks"] != record["ranks"]]
    if parts:
        steps = ", ".join(f"steps {part['from']} to {part['to']} on {part['ranks']}" for part in parts)
        said.append(f"{name}: mixed: a run of {record['ranks']} ranks, of which {steps}")
    return said


def _other_versions(record: records.Record) -> list[str]:
    """What computed the record and is of another version now; not its build (+cpu, +cu130), which the device says."""

    def released(numerics: int | None, versions: dict[str, str]) -> set[tuple[str, str]]:
        libraries = {(name, versions.get(name, "none").split("+")[0]) for name in fingerprint.BENEATH}
        return libraries | {("numerics", str(numerics or "unknown"))}

    made_by = (released(numerics.version_of(part), part["versions"]) for part in record.get("segments", []))
    here = released(numerics.VERSION, fingerprint.versions())
    return [f"{name} {version}" for name, version in sorted(set().union(*made_by) - here)]
