"""Jobs that belong to the launch itself (reading the prompts): they run here, in the process that drives."""

from collections.abc import Callable

from aipo_hpc.graph import Graph
from aipo_hpc.journal import Journal
from aipo_hpc.store import Run
from aipo_hpc.worker import Envelope


def run_here(run: Run, graph: Graph, journal: Journal, tell: Callable[[str], None]) -> None:
    """Do them, as far as they are not done."""
    for job in graph.jobs.values():
        if job.resources is not None:
            continue
        folder = run.job(job.name)
        done = folder.done(graph.fingerprints[job.name])
        while folder.reports:
            report = folder.reports.pop(0)
            tell(report)
            journal.note("report", message=report)
        for shard in range(job.num_shards):
            if shard not in done:
                tell(f"{job.name}: reading")
                Envelope(str(run.path), job.name, shard, f"launch-{journal.fence}", shard, journal.fence).run()
