"""plain_submitit.py WORK: map_array, then the results, stage by stage; what has an output is skipped."""

import sys
from pathlib import Path

import payload
import submitit

if __name__ == "__main__":
    work = Path(sys.argv[1])
    plan = payload.read_plan(work)
    for stage in (1, 2):
        executor = submitit.AutoExecutor(folder=work / "submitit", cluster="slurm")
        executor.update_parameters(timeout_min=10, slurm_array_parallelism=2000, mem_gb=0.1, cpus_per_task=1)
        missing = plan.missing(stage)
        if missing:
            count = len(missing)
            jobs = executor.map_array(payload.run, [work] * count, [stage] * count, missing)
            errors = [error for error in (job.exception() for job in jobs) if error is not None]
            if errors:
                sys.exit(f"stage {stage}: {len(errors)} shards failed; the first: {errors[0]}")
