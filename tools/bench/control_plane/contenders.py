"""The ways to run the two stages: each the command that its user types, again and again until all is done."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from payload import Plan

SCRIPTS = Path(__file__).parent / "scripts"
HERE = Path(__file__).parent
CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Contender:
    """``typed`` is the command; ``environment`` what it needs beside the sandbox's."""

    typed: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def command(self) -> list[str]:
        """The command line."""
        return list(self.typed)


def raw(plan: Plan, python: Path) -> Contender:
    """Two arrays of sbatch, the second element by element after the first; typed again for what is missing."""
    return Contender(("bash", str(SCRIPTS / "raw.sh"), str(plan.work), str(plan.size), str(HERE / "payload.py")))


def ours(plan: Plan, python: Path) -> Contender:
    """The driver of aipo_hpc with its default intervals."""
    paths = f"{HERE}:{CHECKOUT}"
    return Contender((sys.executable, str(SCRIPTS / "ours.py"), str(plan.work)), {"PYTHONPATH": paths})


def submitit(plan: Plan, python: Path) -> Contender:
    """A script with map_array and results, which skips what is there when it is run again."""
    return Contender((str(python), str(SCRIPTS / "plain_submitit.py"), str(plan.work)), {"PYTHONPATH": str(HERE)})


def datatrove(plan: Plan, python: Path) -> Contender:
    """Two SlurmPipelineExecutors, the second depending on the first."""
    return Contender((str(python), str(SCRIPTS / "with_datatrove.py"), str(plan.work)), {"PYTHONPATH": str(HERE)})


def snakemake(plan: Plan, python: Path) -> Contender:
    """A workflow of two rules on the slurm executor plugin, which retries once."""
    typed = (
        *(str(python.parent / "snakemake"), "--snakefile", str(SCRIPTS / "Snakefile"), "--executor", "slurm"),
        *("--jobs", "2000", "--retries", "1", "--latency-wait", "5", "--directory", str(plan.work)),
        *("--default-resources", "slurm_account=root", "slurm_partition=main", "runtime=10", "mem_mb=100"),
        *("--config", f"size={plan.size}", f"payload={HERE / 'payload.py'}"),
    )
    return Contender(typed)


CONTENDERS: dict[str, Callable[[Plan, Path], Contender]] = {
    "raw": raw,
    "ours": ours,
    "submitit": submitit,
    "datatrove": datatrove,
    "snakemake": snakemake,
}
