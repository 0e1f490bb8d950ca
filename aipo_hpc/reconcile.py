"""What to do next, decided from the graph, the files and the scheduler's view alone: a pure function.

It keeps no state, so a driver may die anywhere and another goes on by the same rules:

* a shard with a valid sentinel is done, whatever the scheduler says; without one it is not;
* a shard of a living element is left alone, also while the scheduler's view is older than its submission;
* an element that ended without a sentinel and without a recorded failure gets one recorded, of the scheduler's class;
* one that the scheduler does not know is neither done nor failed until it has been looked for some time;
* missing shards whose inputs are done are submitted; where the cluster knows dependencies, also those whose inputs are
  being computed: element by element against an array of the same shards, else against all of them;
* a shard that failed more often than its class of failure tolerates is given up, and stops neither its siblings nor
  anything that does not need it; before that it is tried again, after a while, and with what its failures ask for: more
  memory or time, a smaller batch, other nodes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from aipo_hpc.adjustment import AS_ASKED, Adjustment, keeping_off
from aipo_hpc.clusters import Dependency, Limits, Submission
from aipo_hpc.damage import answerable
from aipo_hpc.decision import Decision, GivenUp, Submit, View
from aipo_hpc.failures import FAST, Standing, bad_nodes, standings
from aipo_hpc.graph import Edge, Graph, Job
from aipo_hpc.living import Living, by_shard, look
from aipo_hpc.room import Room


def reconcile(graph: Graph, view: View, limits: Limits) -> Decision:
    """Decide what to do next."""
    elements, record = look(view.submissions, view, limits)
    alive = by_shard(elements)
    jobs = [job for job in graph.jobs.values() if job.resources is not None]
    held = answerable(view.failures)
    bad = bad_nodes(held, _good_nodes(view), view.fence)
    standing = {job.name: standings(held.get(job.name, ()), view.fence, bad) for job in jobs}
    given_up = [given for job in jobs for given in _given_up(job, standing[job.name], view, alive.get(job.name, {}))]
    hopeless = {(given.job, given.shard) for given in given_up}
    submit: list[Submit] = []
    room = Room(limits, view.room, [graph.jobs[element.submission.job] for element in elements])
    waiting: dict[str, dict[int, float]] = {}
    if not record:
        for job in jobs:
            missing = [
                shard
                for shard in range(job.num_shards)
                if shard not in view.done.get(job.name, ())
                and shard not in alive.get(job.name, {})
                and (job.name, shard) not in hopeless
            ]
            stands = standing[job.name]
            later = {shard: stands[shard].retry_at for shard in missing if shard in stands}
            later = {shard: retry_at for shard, retry_at in later.items() if retry_at > view.now}
            if later:
                waiting[job.name] = later
            missing = [shard for shard in missing if shard not in later]
            for adjustment, shards in _by_adjustment(missing, stands, bad).items():
                for send in _submissions(job, shards, graph, view, alive, limits):
                    submit += room.fit(job, replace(send, adjustment=adjustment))
    finished = all(len(view.done.get(job.name, ())) == job.num_shards for job in graph.jobs.values())
    return Decision(
        tuple(submit),
        tuple(record),
        tuple(given_up),
        {job: {shard: element.running for shard, element in shards.items()} for job, shards in alive.items()},
        finished,
        room.held,
        waiting,
        bad,
        any(not element.sure for shards in alive.values() for element in shards.values()),
    )


def _good_nodes(view: View) -> dict[str, set[str]]:
    """Nodes by job on which a shard of it is done, or runs for longer than a bad node lets any run."""
    good = {job: set(nodes) for job, nodes in view.nodes.items()}
    for submission in view.submissions:
        for state in view.states.get(submission.name, {}).values():
            if state.running and state.node and (state.seconds or 0) > FAST:
                good.setdefault(submission.job, set()).add(state.node)
    return good


def _given_up(job: Job, standing: Mapping[int, Standing], view: View, alive: Mapping[int, object]) -> Iterable[GivenUp]:
    for shard, stands in sorted(standing.items()):
        if stands.given_up and shard not in view.done.get(job.name, ()) and shard not in alive:
            yield GivenUp(job.name, shard, stands.last)


def _by_adjustment(
    missing: Sequence[int], standing: Mapping[int, Standing], bad: Iterable[str]
) -> dict[Adjustment, list[int]]:
    """Shards that are sent together, because they ask for the same."""
    groups: dict[Adjustment, list[int]] = {}
    for shard in missing:
        asked = standing[shard].adjustment if shard in standing else AS_ASKED
        groups.setdefault(keeping_off(asked, bad), []).append(shard)
    return groups


def _submissions(
    job: Job, missing: Sequence[int], graph: Graph, view: View, alive: Living, limits: Limits
) -> Iterable[Submit]:
    """The submissions that would cover the missing shards whose inputs are there or on their way."""
    if not missing:
        return
    whole = [edge for edge in job.edges.values() if edge.by == "all"]
    by_shard = [edge for edge in job.edges.values() if edge.by == "shard"]
    waits_for: list[Submission] = []
    for edge in whole:
        rest = set(range(graph.jobs[edge.job].num_shards)) - set(view.done.get(edge.job, ()))
        if not rest:
            continue
        on_their_way = _on_their_way(edge, rest, graph, view, alive, limits)
        if on_their_way is None:
            return
        waits_for += on_their_way
    after = tuple(Dependency(submission.name, "afterok") for submission in _each_once(waits_for))
    ready = [shard for shard in missing if all(shard in view.done.get(edge.job, ()) for edge in by_shard)]
    yield from _chunks(job, ready, after, limits)
    if not limits.dependencies or len(by_shard) != 1:
        return
    (edge,) = by_shard
    rest = set(missing) - set(ready)
    living = alive.get(edge.job, {})
    for submission in _each_once(living[shard].submission for shard in rest if shard in living):
        # Element i of the one array waits for element i of the other, so both must hold the same shards.
        if rest.issuperset(submission.shards) and _on_their_way(
            edge, set(submission.shards), graph, view, alive, limits
        ):
            kind = "aftercorr" if len(submission.shards) > 1 else "afterok"
            yield Submit(job.name, submission.shards, (*after, Dependency(submission.name, kind)))


def _on_their_way(
    edge: Edge, shards: set[int], graph: Graph, view: View, alive: Living, limits: Limits
) -> list[Submission] | None:
    """The submissions that compute these shards of an input, or None if one of them is not being computed.

    One whose id is not known cannot be named to the cluster, and one that is over or unknown there gates nothing: they
    are waited for here. Only one step ahead: what waits for its own inputs is not waited for, or one failure would take
    the whole chain along.
    """
    living = alive.get(edge.job, {})
    if not limits.dependencies or not all(shard in living and living[shard].sure for shard in shards):
        return None
    for source in graph.jobs[edge.job].edges.values():
        if len(view.done.get(source.job, ())) < graph.jobs[source.job].num_shards:
            return None
    found = _each_once(living[shard].submission for shard in sorted(shards))
    return None if any(submission.id is None for submission in found) else found


def _each_once(submissions: Iterable[Submission]) -> list[Submission]:
    return list({submission.name: submission for submission in submissions}.values())


def _chunks(job: Job, shards: Sequence[int], after: tuple[Dependency, ...], limits: Limits) -> Iterable[Submit]:
    for start in range(0, len(shards), limits.max_array_size):
        yield Submit(job.name, tuple(shards[start : start + limits.max_array_size]), after)
