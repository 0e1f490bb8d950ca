"""What a job took and gave: rows, counts, time, GPUs and versions, added up over the sentinels of its shards."""

from collections.abc import Iterable, Mapping
from typing import Any

from aipo_hpc.graph import Graph, Job
from aipo_hpc.resources import Resources
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.store import Run


def finished(run: Run, graph: Graph, name: str) -> Mapping[int, Sentinel]:
    """Sentinels of a job; none if the job is not in the graph."""
    return run.job(name).done(graph.fingerprints[name]) if name in graph.jobs else {}


def counts(run: Run, graph: Graph, name: str) -> Mapping[str, float]:
    """Sums of the counts of a job's finished shards (of a job with one shard: its counts)."""
    total: dict[str, float] = {}
    for sentinel in finished(run, graph, name).values():
        for key, value in sentinel.counts.items():
            total[key] = total.get(key, 0) + value
    return total


def pruned_models(run: Run, graph: Graph) -> set[str]:
    """The jobs whose models were made and deleted since."""
    return {
        name
        for name, job in graph.jobs.items()
        if job.stage == "train" and any(map(run.job(name).pruned, finished(run, graph, name).values()))
    }


def num_gpus(sentinel: Sentinel, resources: Resources | None) -> int:
    """GPUs of a shard's task, on all of its nodes."""
    nodes = sentinel.num_processes // (resources.tasks_per_node if resources is not None else 1)
    return len(sentinel.gpus) * max(nodes, 1)


def effort(sentinels: Iterable[Sentinel], job: Job) -> dict[str, float]:
    """Hours of GPUs and of tasks (however many processes each had) that finished shards took, and seconds on the clock."""
    made = list(sentinels)
    hours = [(sentinel.ended - sentinel.started) / 3600 for sentinel in made]
    gpus = (num_gpus(sentinel, job.resources) for sentinel in made)
    return {
        "gpu_hours": sum(number * each for number, each in zip(gpus, hours, strict=True)),
        "task_hours": sum(hours),
        "seconds": max((sentinel.ended for sentinel in made), default=0.0)
        - min((sentinel.started for sentinel in made), default=0.0),
    }


def versions(sentinels: Iterable[Sentinel]) -> dict[str, Any]:
    """Versions that a job's shards were made with: one, or all of them where shards differ."""
    found: dict[str, set[str]] = {}
    for sentinel in sentinels:
        for name, version in sentinel.versions.items():
            found.setdefault(name, set()).add(version)
    return {name: min(seen) if len(seen) == 1 else sorted(seen) for name, seen in sorted(found.items())}
