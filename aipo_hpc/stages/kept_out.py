"""kept_out: lists of benchmark prompts -> KeptOut rows, which ``pairs`` keeps out of training.

Runs where the run is launched, before anything is submitted. Sources are spelled as in ``aipo_hpc.sources``. A row has one of
the columns ``prompt``, ``instruction``, ``question``, ``text``, or ``turns`` or ``messages``, each of which counts as a prompt.
"""

from dataclasses import dataclass
from pathlib import Path

from aipo_hpc.decontamination import benchmark_texts
from aipo_hpc.errors import DataError
from aipo_hpc.rows import KeptOut, write_rows
from aipo_hpc.sources import rows_of
from aipo_hpc.stages.prompts import sources_of
from aipo_hpc.task import Outcome, Task

KEPT_OUT = "kept_out.parquet"


@dataclass(frozen=True)
class KeptOutConfig:
    """Nothing is to be set: the lists are inputs."""


def run(config: KeptOutConfig, task: Task) -> Outcome:
    """Read and check the lists. Raises DataError for one that is missing, empty or malformed, with the line number."""
    prompts: list[KeptOut] = []
    for source in sources_of(task):
        known = len(prompts)
        rows = rows_of(source, "train")
        prompts += [KeptOut(*found) for found in benchmark_texts(rows, Path(source.name).name)]
        if len(prompts) == known:
            raise DataError(f"{source.name}: no prompts in it. Mend the file or take it out of pairs.decontaminate.")
    write_rows(task.out / KEPT_OUT, prompts, KeptOut)
    return Outcome(len(prompts), (KEPT_OUT,), {"prompts": len(prompts), "lists": len(task.inputs)})
