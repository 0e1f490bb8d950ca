"""with_datatrove.py WORK: a pipeline of one step for each stage, one task a shard, the second after the first."""

import sys
from pathlib import Path

import payload
from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep


class Shard(PipelineStep):
    """Runs the payload of this task's shard."""

    name = "shard"

    def __init__(self, work: Path, stage: int) -> None:
        super().__init__()
        self.work = work
        self.stage = stage

    def run(self, data, rank: int = 0, world_size: int = 1):
        """One shard; this class travels by value, without the module's imports."""
        import payload

        payload.run(self.work, self.stage, rank)
        yield from ()


if __name__ == "__main__":
    work = Path(sys.argv[1])
    size = payload.read_plan(work).size
    before = None
    for stage in (1, 2):
        before = SlurmPipelineExecutor(
            pipeline=[Shard(work, stage)],
            tasks=size,
            time="00:10:00",
            partition="main",
            cpus_per_task=1,
            mem_per_cpu_gb=1,
            job_name=f"stage{stage}",
            logging_dir=str(work / f"datatrove-{stage}"),
            venv_path=None,
            env_command=f"source {Path(sys.executable).parent}/activate && export PYTHONPATH={Path(payload.__file__).parent}",
            depends=before,
            max_array_size=4000,
        )
    before.run()
