"""What to do next, decided from the graph, the files and the scheduler's view alone: a pure function.

It keeps no state, so a driver may die anywhere and another goes on by the same rules:

* a shard with a valid sentinel is done, whatever the scheduler says; without one it is not;
* a shard of a living element is left alone, also while the scheduler's view is older than its submission;
* an element that ended without a sentinel and without a recorded failure gets one recorded, of the scheduler's class;
* one that recorded its failure is replaced behind itself: what is sent waits in the scheduler until it is over there;
* one that the scheduler does not know is neither done nor failed until it has been looked for some time;
* missing shards whose inputs are done are submitted; where the cluster knows dependencies, also those whose inputs are
  being computed: element by element against an array of the same shards, else against all of them;
* a shard that failed more often than its class of failure tolerates is given up, and stops neither its siblings nor
  anything that does not need it; before that it is tried again, after a while, and with what its failures ask for: more
  memory or time, a smaller batch, other nodes;
* when nothing else is to be done, the last shards of a job get extra tasks if they take long.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from aipo_hpc.adjustment import AS_ASKED, Adjustment, keeping_off
from aipo_hpc.clusters import Dependency, Limits, Submission
from aipo_hpc.damage import answerable
from aipo_hpc.decision import Decision, GivenUp, Submit, View
from aipo_hpc.failures import FAST, Standing, bad_nodes, standings
from aipo_hpc.graph import Edge, Graph, Job
from aipo_hpc.leftovers import more_tasks
from aipo_hpc.living import MOST_NAMED, Living, look, named
from aipo_hpc.room import Room

TOGETHER = 1.0
"""Seconds by which a shard may be tried again early."""


def reconcile(graph: Graph, view: View, limits: Limits) -> Decision:
    """Decide what to do next."""
    living = look(view.submissions, view, limits)
    extra = look(view.shared.extra, view, limits)
    elements, record = [*living.elements, *extra.elements], (*living.record, *extra.record)
    alive = living.by_shard
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
            # Those whose turn is about to come go along with one whose turn has come: one submission instead of two.
            due = any(retry_at <= view.now for retry_at in later.values())
            by = view.now + (TOGETHER if due else 0.0)
            later = {shard: retry_at for shard, retry_at in later.items() if retry_at > by}
            if later:
                waiting[job.name] = later
            missing = [shard for shard in missing if shard not in later]
            for adjustment, shards in _by_adjustment(missing, stands, bad).items():
                for send in _submissions(job, shards, graph, view, living, limits):
                    submit += room.fit(job, replace(send, adjustment=adjustment))
    if not (record or submit or waiting or room.held):
        for job in jobs:
            for send in more_tasks(job, view, living.elements, extra.elements, limits):
                submit += room.fit(job, send)
    finished = all(len(view.done.get(job.name, ())) == job.num_shards for job in graph.jobs.values())
    return Decision(
        tuple(submit),
        record,
        tuple(given_up),
        {job: {shard: element.running for shard, element in shards.items()} for job, shards in alive.items()},
        finished,
        room.held,
        waiting,
        bad,
        any(not element.sure for element in elements),
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
    job: Job, missing: Sequence[int], graph: Graph, view: View, living: Living, limits: Limits
) -> Iterable[Submit]:
    """The submissions that would cover the missing shards whose inputs are there or on their way."""
    if not missing:
        return
    whole = [edge for edge in job.edges.values() if edge.by == "all"]
    by_shard = [edge for edge in job.edges.values() if edge.by == "shard"]
    after: tuple[Dependency, ...] = ()
    for edge in whole:
        rest = set(range(graph.jobs[edge.job].num_shards)) - set(view.done.get(edge.job, ()))
        if not rest:
            continue
        on_their_way = _on_their_way(edge, rest, graph, view, living, limits)
        if on_their_way is None:
            return
        after = tuple(dict.fromkeys((*after, *on_their_way)))
    ready = [shard for shard in missing if all(shard in view.done.get(edge.job, ()) for edge in by_shard)]
    for chunk in _chunks(ready, limits):
        yield Submit(job.name, chunk, (*after, *living.behind(job.name, chunk)))
    if not limits.dependencies or len(by_shard) != 1:
        return
    (edge,) = by_shard
    rest = set(missing) - set(ready)
    inputs = living.by_shard.get(edge.job, {})
    for submission in _each_once(inputs[shard].submission for shard in rest if shard in inputs):
        shards = submission.shards
        # Element i of the one array waits for element i of the other, so both must hold the same shards.
        same = rest.issuperset(shards) and all(
            shard in inputs and inputs[shard].submission is submission for shard in shards
        )
        if same and _on_their_way(edge, set(shards), graph, view, living, limits):
            input_done = Dependency(submission.name, "aftercorr" if len(shards) > 1 else "afterok")
            yield Submit(job.name, shards, (*after, input_done, *living.behind(job.name, shards)))


def _on_their_way(
    edge: Edge, shards: set[int], graph: Graph, view: View, living: Living, limits: Limits
) -> tuple[Dependency, ...] | None:
    """Dependencies on what computes these shards of an input, or None if one of them is not being computed.

    One whose id is not known cannot be named to the cluster, and one that is over or unknown there gates nothing: they
    are waited for here. Of a submission that has failed in part, the elements are named. Only one step ahead: what waits
    for its own inputs is not waited for, or one failure would take the whole chain along.
    """
    inputs = living.by_shard.get(edge.job, {})
    if not limits.dependencies or not all(shard in inputs and inputs[shard].sure for shard in shards):
        return None
    for source in graph.jobs[edge.job].edges.values():
        if len(view.done.get(source.job, ())) < graph.jobs[source.job].num_shards:
            return None
    found = [inputs[shard] for shard in sorted(shards)]
    rest = [element for element in found if element.submission.name in living.broken]
    if any(element.submission.id is None for element in found) or len(rest) > MOST_NAMED:
        return None
    sound = _each_once(element.submission for element in found if element.submission.name not in living.broken)
    return (*(Dependency(submission.name, "afterok") for submission in sound), *named("afterok", rest))


def _each_once(submissions: Iterable[Submission]) -> list[Submission]:
    return list({submission.name: submission for submission in submissions}.values())


def _chunks(shards: Sequence[int], limits: Limits) -> Iterable[tuple[int, ...]]:
    for start in range(0, len(shards), limits.max_array_size):
        yield tuple(shards[start : start + limits.max_array_size])
