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
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from aipo_hpc.adjustment import AS_ASKED, Adjustment, keeping_off
from aipo_hpc.clusters import Dependency, Limits, Submission, TaskState
from aipo_hpc.damage import answerable
from aipo_hpc.failures import FAST, KINDS, Standing, bad_nodes, standings
from aipo_hpc.graph import Edge, Graph, Job
from aipo_hpc.sentinel import Failure

LOST_AFTER = 60.0
"""Seconds for which an element must be unknown to the scheduler before it counts as lost."""

Element = tuple[str, int]
"""A submission's name and an index in it."""


@dataclass(frozen=True)
class View:
    """One look at the world."""

    done: Mapping[str, AbstractSet[int]]
    """Finished shards by job."""
    failures: Mapping[str, Sequence[Failure]]
    """Recorded failures by job."""
    submissions: Sequence[Submission]
    states: Mapping[str, Mapping[int, TaskState]]
    """The scheduler's last answer, by submission and index."""
    queried: float
    """When the scheduler gave that answer."""
    over_since: Mapping[Element, float]
    """Since when an element has been seen ended, or unknown."""
    fence: int
    """Fencing number of this launch: failures of earlier ones are forgiven."""
    now: float
    room: int | None = None
    """How many shards may be sent now, where the scheduler is known to take only so many."""
    failed_since: Mapping[Element, float] = field(default_factory=dict)
    """When a task's own record of its failure was first seen."""
    nodes: Mapping[str, AbstractSet[str]] = field(default_factory=dict)
    """Nodes on which shards of a job were finished."""


@dataclass(frozen=True)
class Submit:
    """Send these shards of a job."""

    job: str
    shards: tuple[int, ...]
    after: tuple[Dependency, ...] = ()
    adjustment: Adjustment = AS_ASKED


@dataclass(frozen=True)
class RecordFailure:
    """Keep that an element ended without having said why."""

    submission: str
    job: str
    shard: int
    index: int
    kind: str
    message: str
    node: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class GivenUp:
    """A shard that failed too often."""

    job: str
    shard: int
    failure: Failure


@dataclass(frozen=True)
class Decision:
    """What to do now, and how things stand."""

    submit: tuple[Submit, ...] = ()
    record: tuple[RecordFailure, ...] = ()
    given_up: tuple[GivenUp, ...] = ()
    alive: Mapping[str, Mapping[int, bool]] = field(default_factory=dict)
    """Shards that wait or run, by job; True: the scheduler says that it runs."""
    finished: bool = False
    held: bool = False
    """Something could be sent, but the scheduler has no room for it now."""
    waiting: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Shards that failed and are tried again later, by job; and when."""
    bad_nodes: Mapping[str, str] = field(default_factory=dict)
    """Nodes that nothing is sent to any more, each with the reason."""
    settling: bool = False
    """An element has ended, or is not known, and files or scheduler may yet tell more of it."""

    @property
    def stuck(self) -> bool:
        """Nothing runs, nothing can be sent now or later, and it is not finished."""
        later = self.held or self.waiting
        return not (self.finished or self.submit or self.record or later or any(self.alive.values()))


def reconcile(graph: Graph, view: View, limits: Limits) -> Decision:
    """Decide what to do next."""
    alive, record = _living(view, limits)
    jobs = [job for job in graph.jobs.values() if job.resources is not None]
    held = answerable(view.failures)
    bad = bad_nodes(held, _good_nodes(view), view.fence)
    standing = {job.name: standings(held.get(job.name, ()), view.fence, bad) for job in jobs}
    given_up = [given for job in jobs for given in _given_up(job, standing[job.name], view, alive.get(job.name, {}))]
    hopeless = {(given.job, given.shard) for given in given_up}
    submit: list[Submit] = []
    room = _Room(limits, view.room, graph, alive)
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


class _Element(NamedTuple):
    """What computes a shard. Not ``sure``: it ended, or is not known, and files or scheduler may yet tell more."""

    submission: Submission
    running: bool
    sure: bool = True


Living = dict[str, dict[int, _Element]]
"""By job and shard."""


def _living(view: View, limits: Limits) -> tuple[Living, list[RecordFailure]]:
    """Which shards are being computed, and which elements ended without a word."""
    alive: Living = {}
    record: list[RecordFailure] = []
    over = _over(failure for failures in view.failures.values() for failure in failures)
    for submission in view.submissions:
        states = view.states.get(submission.name, {})
        for index, shard in enumerate(submission.shards):
            if shard in view.done.get(submission.job, ()):
                continue
            state = states.get(index)
            if (by_driver := over.get((submission.name, index))) is not None:
                # A task that said why it failed may still be ending, or the scheduler may have begun it once more.
                heard = view.queried >= view.failed_since.get((submission.name, index), 0.0)
                if not by_driver and (not heard or (state is not None and state.alive)):
                    alive.setdefault(submission.job, {})[shard] = _Element(submission, False, sure=False)
                continue
            if (state is not None and state.alive) or view.queried <= submission.time:
                running = state is not None and state.running
                alive.setdefault(submission.job, {})[shard] = _Element(submission, running)
                continue
            since = view.over_since.get((submission.name, index), view.now)
            # Time in which the scheduler was not heard says nothing of what it does not know.
            if state is None:
                settled = view.queried - since >= LOST_AFTER
            else:  # what was cancelled because its input failed never ran, and has no files to wait for
                settled = state.kind == "dependency" or view.now - since >= limits.settle
            if not settled:
                alive.setdefault(submission.job, {})[shard] = _Element(submission, False, sure=False)
                continue
            kind = "lost" if state is None else state.kind or "no_sentinel"
            message = state.detail if state is not None and state.detail else KINDS[kind].advice
            node, ran = ("", None) if state is None else (state.node, state.seconds)
            record.append(RecordFailure(submission.name, submission.job, shard, index, kind, message, node, ran))
    return alive, record


def _over(failures: Iterable[Failure]) -> dict[Element, bool]:
    """Elements with a recorded failure; True if the driver recorded it, because the scheduler had said that it is over."""
    found: dict[tuple[str, int], bool] = {}
    for failure in failures:
        if (element := failure.element) is not None:
            found[element] = found.get(element, False) or failure.by_driver
    return found


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


class _Room:
    """What is left: cores and GPUs where the cluster has no queue of its own, jobs where the scheduler takes only so many."""

    def __init__(self, limits: Limits, num_shards: int | None, graph: Graph, alive: Living) -> None:
        self._limits = limits
        self._cpus, self._gpus = limits.cpus or 0, limits.gpus or 0
        self._num_shards = num_shards
        self.held = False
        for name, shards in alive.items():
            for _ in shards:
                self._take(graph.jobs[name])

    def fit(self, job: Job, send: Submit) -> list[Submit]:
        """As much of the submission as fits now; the rest comes again at a later look."""
        if self._num_shards is not None and len(send.shards) > self._num_shards:
            self.held = True
            # Element by element works only between arrays of the same shards.
            if self._num_shards == 0 or any(dependency.kind == "aftercorr" for dependency in send.after):
                return []
            send = replace(send, shards=send.shards[: self._num_shards])
        if self._limits.cpus is not None:
            cpus, gpus = self._needs(job)
            if cpus > self._cpus or gpus > self._gpus:
                return []
            self._take(job)
        if self._num_shards is not None:
            self._num_shards -= len(send.shards)
        return [send]

    def _take(self, job: Job) -> None:
        cpus, gpus = self._needs(job)
        self._cpus -= cpus
        self._gpus -= gpus

    def _needs(self, job: Job) -> tuple[int, int]:
        """What one shard needs; more cores than the machine has are asked for as all of them."""
        assert job.resources is not None
        cpus = job.resources.cpus_per_task * job.resources.tasks_per_node
        return min(cpus, self._limits.cpus or 0), job.resources.gpus_per_node
