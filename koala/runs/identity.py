"""Which run a configuration is: a hash of everything that changes its numbers, the folder of that name, and what its
record says of who made it."""

import datetime
import hashlib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from koala import data, fingerprint, numerics, records
from koala.run_keys import IMMATERIAL, PRETRAINED
from koala.runs.schema import Recipe
from koala.training.machine import device_name
from koala.training.ranks import Ranks

# Where the data is from, which its fingerprint stands for, and how many processes decode it.
IMMATERIAL_DATA = {"path", "hub", "hub_config", "hub_revision", "workers", *Recipe.model_fields}
# Which of several implementations of the same update is used.
IMMATERIAL_OPTIM = {"fused", "foreach"}


@dataclass(frozen=True)
class RunId:
    """Which run a configuration is.

    Args:
        name: data/model/optim, for people.
        hash: 12 hexadecimal digits that name all that changes the numbers, but the seed.
        folder: that belongs to this run and no other.
        fingerprint: of the content of its data.
    """

    name: str
    hash: str
    folder: Path
    fingerprint: str


def material(config: dict) -> dict:
    """What of a resolved configuration can change the numbers of a run, the content of its data and the seed apart."""
    matter = {key: value for key, value in config.items() if key not in IMMATERIAL}
    matter["data"] = {key: value for key, value in matter["data"].items() if key not in IMMATERIAL_DATA}
    matter["optim"] = {key: value for key, value in matter["optim"].items() if key not in IMMATERIAL_OPTIM}
    return matter


def identify(cfg: DictConfig) -> RunId:
    """Which run `cfg` is; reads its data, once for the same files.

    In the hash are the number of ranks (BatchNorm's statistics and dropout differ with it), accumulation, precision and
    the content of the data and of local weights; not in it is what changes the rounding of sums at most, or nothing.

    Raises:
        ConfigError: files of the data are missing.
    """
    matter = material(OmegaConf.to_container(cfg, resolve=True))
    fingerprint = matter["data"]["fingerprint"] = data.fingerprint(cfg.data, cfg.data_root)
    if (tokenizer := matter["data"].get("tokenizer")) and Path(tokenizer).is_dir():
        matter["data"]["tokenizer"] = "local"  # the fingerprint has its content
    model = cfg.model.copy()
    for key in PRETRAINED:
        if (weights := Path(OmegaConf.select(model, key) or "")).name and weights.exists():  # else the name of a hub's
            OmegaConf.update(model, key, data.digest(_files(weights), Path(cfg.data_root)))
    matter["model"] = OmegaConf.to_container(model, resolve=True)
    name, text = f"{cfg.data.name}/{cfg.model.name}/{cfg.optim.name}", json.dumps(matter, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return RunId(name, digest, folder_of(cfg.output_root, name, digest, cfg.seed), fingerprint)


def _files(path: Path) -> list[tuple[str, Path]]:
    """The files of a folder by their names; a file wherever it lies."""
    return [(file.name, file) for file in sorted(path.iterdir()) if file.is_file()] if path.is_dir() else [("", path)]


def folder_of(root: str, name: str, digest: str, seed: int) -> Path:
    """The folder of a run below an `output_root`."""
    return Path(root) / name / digest / f"seed{seed}"


def run_dir(cfg: DictConfig) -> Path:
    """The folder that belongs to this run and no other."""
    return identify(cfg).folder


def now() -> str:
    """UTC, ISO 8601, seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def opening(cfg: DictConfig, run_id: RunId, ranks: Ranks, command: str | None) -> records.Opening:
    """What a record says before anything is measured."""
    return {
        "schema": records.SCHEMA,
        "name": run_id.name,
        "config": OmegaConf.to_container(cfg, resolve=True),
        "config_hash": run_id.hash,
        "seed": cfg.seed,
        "precision": cfg.precision,
        "ranks": cfg.ranks,
        "world_size": ranks.world,
        "data": {
            "name": cfg.data.name,
            "fingerprint": run_id.fingerprint,
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
    """The start of a segment, this process's part of a run (records.Segment); the trainer adds the rest."""
    return {
        **{key: opening[key] for key in ("versions", "git", "device")},
        "numerics": numerics.VERSION,
        "threads": torch.get_num_threads(),
        "compile": cfg.compile,
        "ranks": ranks.world,
    }


def remarks(record: records.Record) -> list[str]:
    """What a person who is given this record should know: it is of other versions, or of other ranks than it claims."""
    lines, name = [], f"{record['name']} seed {record['seed']}"
    if others := _other_versions(record):
        lines.append(f"{name}: this record was made by {', '.join(others)}; rerun=true replaces it by one made here")
    parts = [part for part in record.get("segments", []) if part["ranks"] != record["ranks"]]
    if parts:
        steps = ", ".join(f"steps {part['from']} to {part['to']} on {part['ranks']}" for part in parts)
        lines.append(f"{name}: mixed: a run of {record['ranks']} ranks, of which {steps}")
    return lines


def _other_versions(record: records.Record) -> list[str]:
    """What computed the record and is of another version now; not its build (+cpu, +cu130), which the device says."""

    def released(numerics: int | None, versions: dict[str, str]) -> set[tuple[str, str]]:
        libraries = {(name, versions.get(name, "none").split("+")[0]) for name in fingerprint.BENEATH}
        return libraries | {("numerics", str(numerics or "unknown"))}

    made_by = (released(numerics.version_of(part), part["versions"]) for part in record.get("segments", []))
    here = released(numerics.VERSION, fingerprint.versions())
    return [f"{name} {version}" for name, version in sorted(set().union(*made_by) - here)]
