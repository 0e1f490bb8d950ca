"""Stopping a run, and setting parts of it aside; both leave a run that the launch command resumes."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from aipo_hpc.chain import make_steps
from aipo_hpc.clusters import Cluster, Submission, TaskState, make_cluster
from aipo_hpc.errors import ClusterError
from aipo_hpc.graph import Graph
from aipo_hpc.journal import Journal
from aipo_hpc.lease import Lease, is_alive, read_owner, request_cancel
from aipo_hpc.recipe import Recipe
from aipo_hpc.record import check_job, read_graph
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
                alive.setdefault(submission.job, {})[submission.shards[index]] = state.running
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


def reset_job(run: Run, name: str) -> str:
    """Set a job and all downstream of it aside; returns what was moved. Raises RunError for an unknown job."""
    graph = read_graph(run)
    check_job(graph, name, run)
    names = graph.downstream(name)
    lost = [each for job in names for each in run.job(job).done(graph.fingerprints[job]).values()]
    hours = sum((each.ended - each.started) * max(len(each.gpus), 1) * each.num_processes for each in lost) / 3600
    with Lease(run):
        target = run.set_jobs_aside(names)
        Journal(run).note("reset", jobs=names, moved_to=str(target))
    return (
        f"moved {len(names)} jobs ({len(lost)} finished shards, {hours:.2f} task-hours to redo) to {target}:\n  "
        + "\n  ".join(names)
        + "\nThe launch command computes them anew."
    )
