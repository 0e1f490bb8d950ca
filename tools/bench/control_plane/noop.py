"""The payload as a stage of aipo_hpc, for the benchmark alone.

Unpickling the envelope imports this module, which adds the stage to the table, in the driver and on the node alike.
"""

from dataclasses import dataclass
from pathlib import Path

import payload

from aipo_hpc.clusters.envelope import SubmititEnvelope
from aipo_hpc.resources import Resources
from aipo_hpc.settings import tuning
from aipo_hpc.stage_table import STAGES, Stage
from aipo_hpc.task import Outcome, Task

OUTPUT = "output.txt"


@dataclass(frozen=True)
class NoopConfig:
    """Settings of the stage."""

    work: str = ""
    stage: int = 1
    resources: Resources = tuning(Resources(time=10, mem_gb=0.1, array_parallelism=2000))


def run(config: NoopConfig, task: Task) -> Outcome:
    """Execute the payload of this shard."""
    payload.run(Path(config.work), config.stage, task.shard)
    (task.out / OUTPUT).write_text(payload.content(config.stage, task.shard))
    return Outcome(1, (OUTPUT,))


class NoopEnvelope(SubmititEnvelope):
    """The package's own envelope, pickled by this module's name."""


STAGES["noop"] = Stage("noop:NoopConfig")  # type: ignore[index]
