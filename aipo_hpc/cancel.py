"""Stopping a run, and setting parts of it aside; both leave a run that the launch command resumes."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from aipo_hpc.chain import make_steps
from aipo_hpc.clusters import Cluster, Submission, TaskState, make_cluster
from aipo_hpc.errors import ClusterError, RunError
from aipo_hpc.graph import Graph
from aipo_hpc.journal import Journal
from aipo_hpc.lease import Lease, is_alive, read_owner, request_cancel
from aipo_hpc.ledger import finished, pruned_models
from aipo_hpc.recipe import Recipe
from aipo_hpc.record import check_job, read_graph
from aipo_hpc.retention import complete, take_back, wanted_again
from aipo_hpc.settings import from_plain
from aipo_hpc.store import Run

if TYPE_CHECKING:
    from aipo_hpc.clusters.steps import Steps

_PATIENCE = 60.0
"""Seconds to wait for a living driver to stop the run by itself."""


def cancel_run(run: Run) -> str:
    """Stop the driver, then whatever it left waiting or running; returns what was done."""
    graph = read_graph(run)
    stop_chain(run, waiting_only=True)
    owner = read_owner(run)
    if owner is not None and is_alive(owner):
        request_cancel(run)
        deadline = time.monotonic() + _PATIENCE
        while read_owner(run) is not None:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{run.path}: its driver (process {owner['pid']} on {owner['host']}) has not stopped within "
                    f"{_PATIENCE:g} s. Stop that process, then type this again."
                )
            time.sleep(0.2)
        stop_chain(run)
        return f"{run.path}: its driver has stopped the run; the launch command resumes it"
    stop_chain(run)
    with Lease(run):
        cluster = cluster_of(run)
        living = [submission for submission, _ in _living(run, graph, cluster)]
        Journal(run).note("cancel", submissions=[submission.name for submission in living])
        cluster.cancel(living)
    return f"{run.path}: no driver; {len(living)} submissions cancelled. The launch command resumes the run"


def stop_chain(run: Run, *, waiting_only: bool = False) -> None:
    """Cancel the steps of a run that is driven by a chain, or only one that waits (one that drives ends the run in order)."""
    if (steps := steps_of(run)) is not None:
        steps.cancel(waiting_only=waiting_only)


def steps_of(run: Run) -> "Steps | None":
    """The steps of a run's chain; None if it is driven otherwise."""
    written = run.read_recipe()
    recipe = from_plain(Recipe, written["settings"])
    return make_steps(recipe, make_cluster(recipe), written["run_id"]) if recipe.drive == "chain" else None


def living_shards(run: Run, graph: Graph) -> dict[str, dict[int, bool]]:
    """Shards that wait or run, by job; True: it runs. Asks the scheduler once, if anything is unfinished."""
    alive: dict[str, dict[int, bool]] = {}
    for submission, states in _living(run, graph, None):
        for index, state in states.items():
            if state.alive:
                living = alive.setdefault(submission.job, {})
                shard = submission.shards[index]
                living[shard] = state.running or living.get(shard, False)
    return alive


def cluster_of(run: Run) -> Cluster:
    """The cluster that a run was last launched on."""
    return make_cluster(from_plain(Recipe, run.read_recipe()["settings"]))


def _living(run: Run, graph: Graph, cluster: Cluster | None) -> list[tuple[Submission, Mapping[int, TaskState]]]:
    """Submissions with an element that waits or runs, and the states of their elements."""
    unfinished = [
        submission
        for submission in Journal(run).submissions.values()
        if submission.job in graph.jobs
        and not set(submission.shards) <= set(run.job(submission.job).done(graph.fingerprints[submission.job]))
    ]
    if not unfinished:
        return []
    states = (cluster or cluster_of(run)).states(unfinished)
    living = [(submission, states.get(submission.name, {})) for submission in unfinished]
    return [(submission, told) for submission, told in living if any(state.alive for state in told.values())]


def price(run: Run, graph: Graph, names: Sequence[str]) -> tuple[int, str]:
    """How many finished shards these jobs have, and what they took: GPU-hours and task-hours, in words."""
    gpu_hours = task_hours = 0.0
    num_shards = 0
    for name in names:
        resources = graph.jobs[name].resources
        for sentinel in run.job(name).done(graph.fingerprints[name]).values():
            hours = (sentinel.ended - sentinel.started) / 3600
            num_shards += 1
            task_hours += hours * sentinel.num_processes
            gpu_hours += hours * (resources.nodes * resources.gpus_per_node if resources is not None else 0)
    return num_shards, f"{gpu_hours:.2f} GPU-hours, {task_hours:.2f} task-hours"


def reset_job(run: Run, name: str) -> str:
    """Set a job and all downstream of it aside; returns what was moved. Raises RunError for an unknown job."""
    graph = read_graph(run)
    check_job(graph, name, run)
    names = graph.downstream(name)
    done = complete(graph, {job: finished(run, graph, job) for job in graph.jobs}) - set(names)
    again = [job for job in wanted_again(graph, done, pruned_models(run, graph)) if job not in names]
    num_lost, cost = price(run, graph, [*again, *names])
    with Lease(run):
        living = {each.job for each, _ in _living(run, graph, None) if each.job in (*again, *names)}
        if living:
            raise RunError(
                f"{run.path}: shards of {', '.join(job for job in graph.jobs if job in living)} still wait or run. "
                f"Stop them first: python -m aipo_hpc cancel {run.path}"
            )
        target = run.set_jobs_aside(names)
        journal = Journal(run)
        journal.reset(names, moved_to=str(target))
        take_back(run, graph, journal, again)
    why = "their models were deleted (keep_models), and these jobs read them; what else was made with them stays"
    return (
        f"moved {len(names)} jobs ({num_lost} finished shards, {cost} to redo) to {target}:\n  "
        + "\n  ".join(names)
        + (f"\nTo be computed again before that, because {why}:\n  " + "\n  ".join(again) if again else "")
        + "\nThe launch command computes them anew."
    )
