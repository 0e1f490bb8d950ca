"""The plan: the graph as it would run, what is done, what would be sent and why. Nothing is submitted or written."""

import math
import time
from collections import Counter
from collections.abc import Set as AbstractSet

from rich.table import Table

from aipo_hpc.drift import drifts
from aipo_hpc.failures import standings
from aipo_hpc.graph import Edge, Graph, Job
from aipo_hpc.journal import Journal
from aipo_hpc.ledger import pruned_models
from aipo_hpc.resources import Resources
from aipo_hpc.retention import complete, wanted_again
from aipo_hpc.store import Run


def plan_table(graph: Graph, run: Run) -> Table:
    """One row per job."""
    changed = drifts(run, graph)
    pruned = pruned_models(run, graph)
    all_done = {name: run.job(name).done(graph.fingerprints[name]) for name in graph.jobs}
    again = wanted_again(graph, complete(graph, all_done), pruned)
    table = Table("job", "shards", "done", "resources of a shard", "inputs", "what would happen, and why", box=None)
    for job in graph.jobs.values():
        done = set(all_done[job.name]) if job.name not in again else set()
        table.add_row(
            job.name,
            str(job.num_shards),
            str(len(done)),
            shape(job.resources),
            ", ".join(
                dict.fromkeys(
                    f"{edge.job} ({'shard by shard' if edge.by == 'shard' else 'all'})" for edge in job.edges.values()
                )
            ),
            _outlook(job, done, graph, run, changed.get(job.name, []))
            + ("; its model was deleted (keep_models)" if job.name in pruned else "")
            + (" and is needed again" if job.name in again else ""),
        )
    return table


def shape(resources: Resources | None) -> str:
    """Resources in few words."""
    if resources is None:
        return "at the launch"
    parts = [f"{resources.nodes} node{'s' if resources.nodes > 1 else ''}"]
    if resources.tasks_per_node > 1:
        parts.append(f"{resources.tasks_per_node} tasks/node")
    parts.append(f"{resources.gpus_per_node} GPU/node" if resources.gpus_per_node else "no GPU")
    parts.append(f"{resources.cpus_per_task} CPU/task")
    if resources.mem_gb is not None:
        parts.append(f"{resources.mem_gb:g} GB")
    parts.append(f"{resources.time} min")
    return ", ".join(parts)


def _outlook(job: Job, done: set[int], graph: Graph, run: Run, changed: list[str]) -> str:
    if changed:
        return f"REFUSED, settings differ: {'; '.join(changed)}"
    missing = [shard for shard in range(job.num_shards) if shard not in done]
    if not missing:
        return "nothing: done"
    verb = "read" if job.resources is None else "send"
    what = f"{verb} all {job.num_shards}" if not done else f"{verb} {len(missing)}: no sentinel of {_ranges(missing)}"
    failed = Counter(failure.kind for failure in run.job(job.name).failures() if failure.shard in missing)
    if failed:
        what += f" (failed before: {', '.join(f'{kind} {number}' for kind, number in failed.items())})"
    if later := next_retry(job, run, set(missing)):
        what += f", {later}"
    waiting = dict.fromkeys(edge.job for edge in job.edges.values() if not _complete(edge, graph, run))
    return what + (f", after {', '.join(waiting)}" if waiting else "")


def next_retry(job: Job, run: Run, missing: AbstractSet[int]) -> str:
    """When the next of the missing shards that failed is tried again, in words; empty if none of them waits."""
    standing = standings(run.job(job.name).failures(), Journal(run).fence)
    times = [stands.retry_at for shard, stands in standing.items() if shard in missing and not stands.given_up]
    later = [at - time.time() for at in times if at > time.time()]
    return f"retry in {math.ceil(min(later))} s" if later else ""


def _complete(edge: Edge, graph: Graph, run: Run) -> bool:
    return len(run.job(edge.job).done(graph.fingerprints[edge.job])) == graph.jobs[edge.job].num_shards


def _ranges(numbers: list[int]) -> str:
    """``0-3, 7``, at most eight parts."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    shown = [f"{first}-{last}" if last > first else str(first) for first, last in parts[:8]]
    return "shard " + ", ".join(shown) + (", ..." if len(parts) > 8 else "")
