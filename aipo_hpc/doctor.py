"""What a run needs of this machine, looked at before anything is launched: a table of rows, each ok, a warning or a problem.

Every row says what was found and, unless it is ok, what to do. Nothing is submitted, and nothing that was tried stays.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

from aipo_hpc.durable import link_new, sync_folder, write_synced
from aipo_hpc.errors import AipoError
from aipo_hpc.graph import build_graph
from aipo_hpc.ownership import refuse_others
from aipo_hpc.preflight import resolve
from aipo_hpc.recipe import Recipe, SlurmConfig, validate

_COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun")
_LITTLE_GB = 50.0
"""Free space below which a run may well fill the disk: a 7B model has 15 GB, a checkpoint of its training four times that."""
_LIBRARIES = ("torch", "transformers", "deepspeed", "submitit", "vllm")


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    what: str
    state: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


def examine(recipe: Recipe, run_dir: Path) -> list[Finding]:
    """All rows for a recipe and the folder of its run, in the order in which they matter."""
    rows = [_settings(recipe)]
    if recipe.cluster == "slurm":
        rows += slurm(recipe.slurm, _partitions(recipe))
    rows += [folder(run_dir), *_libraries(recipe), _models(recipe), _gpu(recipe)]
    return rows


def findings_table(findings: list[Finding]) -> Table:
    """The rows, to print."""
    table = Table("what", "", "found", "what to do", box=None)
    for each in findings:
        table.add_row(each.what, each.state, each.found, each.advice)
    return table


def _settings(recipe: Recipe) -> Finding:
    try:
        validate(recipe)
    except AipoError as error:
        return Finding("recipe", "problem", str(error), "mend the field")
    return Finding("recipe", "ok", recipe.name)


def _partitions(recipe: Recipe) -> list[str]:
    """The partitions that jobs of the recipe name."""
    stages = ("generate", "rank", "pairs", "reference", "train", "evaluate")
    shapes = [*(getattr(recipe, stage).resources for stage in stages), recipe.slurm.driver]
    return sorted({name for each in shapes if (name := each.partition or recipe.slurm.partition)})


def slurm(config: SlurmConfig, partitions: list[str]) -> Iterator[Finding]:
    """Rows on Slurm: clients, controller, limits, partitions, accounting."""
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if missing:
        advice = "load the site's Slurm module, or go to a login node; cluster=local needs none"
        yield Finding("Slurm clients", "problem", f"not on PATH: {', '.join(missing)}", advice)
        return
    yield Finding("Slurm clients", "ok", str(shutil.which("sbatch")))
    shown = _ask("scontrol", "show", "config")
    if isinstance(shown, Refused):
        advice = (
            "is SLURM_CONF the right one, does slurmctld run? `scontrol ping` tells; a run waits for it once launched"
        )
        yield Finding("controller", "problem", shown, advice)
        return
    version = re.search(r"SLURM_VERSION\s*=\s*(\S+)", shown)
    yield Finding("controller", "ok", f"answers, Slurm {version.group(1) if version else 'of unknown version'}")
    size = re.search(r"\bMaxArraySize\s*=\s*(\d+)", shown)
    arrays = int(size.group(1)) if size else None
    if arrays is not None and arrays < 2:
        yield Finding(
            "MaxArraySize", "warning", f"{arrays}: no arrays", "nothing: every shard becomes a job of its own"
        )
    else:
        yield Finding("MaxArraySize", "ok", str(arrays or "not told"))
    known = _ask("sinfo", "--noheader", "--format=%R")
    names = [] if isinstance(known, Refused) else known.split()
    for partition in partitions:
        for name in partition.split(","):
            if name in names:
                yield Finding(f"partition {name}", "ok", "exists")
            else:
                yield Finding(f"partition {name}", "problem", f"not among {', '.join(names)}", "slurm.partition=...")
    if not partitions:
        yield Finding("partition", "ok", "none named: the site's default")
    yield from _accounting(config)


def _accounting(config: SlurmConfig) -> Iterator[Finding]:
    told = _ask("sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID", "--starttime=now-1hour")
    if isinstance(told, Refused):
        yield Finding("accounting", "warning", told, "nothing: ends of jobs are told by files and squeue alone")
        return
    yield Finding("accounting", "ok", "sacct answers")
    user = f"user={os.environ.get('USER') or os.getuid()}"
    found = _ask("sacctmgr", "--noheader", "--parsable2", "show", "assoc", user, "format=Account,MaxSubmit")
    limits = [] if isinstance(found, Refused) else [line.split("|") for line in found.split()]
    accounts = {line[0] for line in limits}
    if config.account and accounts and config.account not in accounts:
        yield Finding(
            "account", "problem", f"{config.account} is not among {', '.join(sorted(accounts))}", "slurm.account"
        )
    numbers = sorted({line[1] for line in limits if line[1:] and line[1]})
    yield Finding("MaxSubmitJobs", "ok", ", ".join(numbers) or "none told; one that is met is kept to as it is learnt")


class Refused(str):
    """Why a command told nothing."""


def _ask(*command: str) -> str:
    """What a command prints, or Refused."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Refused(f"{command[0]}: {error}")
    return (
        done.stdout if done.returncode == 0 else Refused((done.stderr or done.stdout).strip() or f"{command[0]} failed")
    )


def folder(path: Path) -> Finding:
    """The row on the run directory: tried where it is, or where it would be made."""
    where = next(each for each in (path, *path.parents) if each.exists())
    what = f"run_dir {path}" + ("" if where == path else f" (not there yet; tried in {where})")
    try:
        if where == path:
            refuse_others(path)
        trial = where / f".doctor-{uuid.uuid4().hex}"
        trial.mkdir(mode=0o700)
        try:
            broken = [name for name, works in _TRIALS.items() if not works(trial)]
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    except (AipoError, OSError) as error:
        return Finding(what, "problem", str(error), "choose another place with run_dir=..., or mend its rights")
    if broken:
        advice = "the file protocol needs it: choose a file system that does it with run_dir=..."
        return Finding(what, "problem", f"does not work there: {', '.join(broken)}", advice)
    free = shutil.disk_usage(where).free / 1e9
    found = f"{free:.0f} GB free; {', '.join(_TRIALS)} work"
    if free < _LITTLE_GB:
        return Finding(what, "warning", found, "a run of large models may not fit: free space, or keep_models=1")
    return Finding(what, "ok", found)


def _renames(trial: Path) -> bool:
    write_synced(trial / "new", "new")
    write_synced(trial / "old", "old")
    os.replace(trial / "new", trial / "old")
    return (trial / "old").read_text() == "new" and not (trial / "new").exists()


def _links_once(trial: Path) -> bool:
    write_synced(trial / "one", "one")
    write_synced(trial / "two", "two")
    return link_new(trial / "one", trial / "final") and not link_new(trial / "two", trial / "final")


def _makes_folders_once(trial: Path) -> bool:
    (trial / "lock").mkdir()
    with suppress(FileExistsError):
        (trial / "lock").mkdir()
        return False
    return True


def _keeps_names(trial: Path) -> bool:
    sync_folder(trial)
    return True


_TRIALS: dict[str, Callable[[Path], bool]] = {
    "rename": _renames,
    "exclusive link": _links_once,
    "exclusive mkdir": _makes_folders_once,
    "fsync of folders": _keeps_names,
}


def _libraries(recipe: Recipe) -> Iterator[Finding]:
    for name in _LIBRARIES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            needed = name != "vllm" or recipe.generate.engine == "vllm"
            if not needed:
                yield Finding(name, "ok", "not installed, and not asked for")
            elif recipe.slurm.python is not None:
                yield Finding(name, "warning", "not installed here", f"it must be where {recipe.slurm.python} runs")
            else:
                extra = "aipo_hpc[gpu]" if name == "vllm" else "aipo_hpc"
                yield Finding(
                    name, "problem", "not installed", f"pip install '{extra}', or generate.engine=transformers"
                )


def _models(recipe: Recipe) -> Finding:
    try:
        resolve(build_graph(recipe))
    except AipoError as error:
        return Finding("models and prompts", "problem", str(error), "")
    return Finding("models and prompts", "ok", "found, or in the cache, and fit to be used")


def _gpu(recipe: Recipe) -> Finding:
    shown = _ask("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if isinstance(shown, Refused):
        where = "" if recipe.cluster == "local" else "; jobs run elsewhere"
        return Finding("GPU of this machine", "ok", f"none{where}")
    return Finding("GPU of this machine", "ok", ", ".join(shown.strip().splitlines()))
