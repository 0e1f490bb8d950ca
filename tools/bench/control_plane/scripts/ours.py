"""ours.py WORK: the two stages as jobs of a graph, driven by aipo_hpc's driver on its Slurm cluster."""

import sys
import zlib
from pathlib import Path

import noop
import payload

from aipo_hpc.clusters import envelope, slurm
from aipo_hpc.driver import Driver
from aipo_hpc.graph import Edge, Job, make_graph
from aipo_hpc.journal import Journal
from aipo_hpc.lease import Lease
from aipo_hpc.recipe import Recipe, SlurmConfig
from aipo_hpc.record import job_record
from aipo_hpc.store import Run
from aipo_hpc.terminal import Screen

if __name__ == "__main__":
    work = Path(sys.argv[1])
    plan = payload.read_plan(work)
    envelope.SubmititEnvelope = noop.NoopEnvelope  # so that the node imports the benchmark's stage
    configs = [noop.NoopConfig(str(work), stage) for stage in (1, 2)]
    first = Job("iter-00/first", "noop", 0, plan.size, 0, configs[0], {}, configs[0].resources)
    inputs = {"first": Edge(first.name, noop.OUTPUT, "shard")}
    second = Job("iter-00/second", "noop", 0, plan.size, 0, configs[1], inputs, configs[1].resources)
    graph = make_graph([first, second])
    run = Run(work / "run")
    run_id = f"{zlib.crc32(str(work).encode()):08x}"
    run.create()
    run.write_recipe({"run_id": run_id, "recipe": "bench", "settings": {}})
    recipe = Recipe()
    cluster = slurm.SlurmCluster(SlurmConfig())
    cluster.check(graph)
    screen = Screen(graph, run)
    with Lease(run) as lease, screen:
        journal = Journal(run)
        journal.launch(cluster="slurm", drive="follow")
        for job in graph.jobs.values():
            run.job(job.name).create(job_record(graph, job, recipe.payload_timeout))
        Driver(run, run_id, graph, cluster, journal, lease, screen.tell, screen.show).follow(recipe.poll_seconds)
