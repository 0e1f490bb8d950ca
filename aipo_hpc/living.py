"""Which elements of submissions wait or run, and which ended without a word: files and scheduler put together.

An element that said why it failed is replaced at once, behind itself: what is sent for its shard waits in the scheduler until
the element is over, so nothing has to be asked first and no two ever run at a time. The same holds for an element that waits
in vain for one that failed; the scheduler is about to cancel it.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property

from aipo_hpc.clusters import Dependency, Limits, Submission
from aipo_hpc.decision import Element, RecordFailure, View, heard_over
from aipo_hpc.failures import KINDS

LOST_AFTER = 60.0
"""Seconds for which an element must be unknown to the scheduler before it counts as lost."""

MOST_NAMED = 50
"""Elements that dependencies name one by one, at most."""


@dataclass(frozen=True)
class LivingElement:
    """What computes a shard. Not ``sure``: it ended, or is not known, and files or scheduler may yet tell more."""

    submission: Submission
    index: int
    running: bool
    sure: bool = True

    @property
    def shard(self) -> int:
        """What it computes."""
        return self.submission.shards[self.index]


@dataclass(frozen=True)
class Living:
    """What is being computed, and what has come to an end."""

    elements: Sequence[LivingElement]
    record: Sequence[RecordFailure]
    """Elements that ended without a word."""
    ending: Sequence[LivingElement]
    """Elements that do nothing more, and that the scheduler has yet to call over."""
    broken: AbstractSet[str]
    """Submissions with an element that failed: as a whole they never succeed."""

    @cached_property
    def by_shard(self) -> dict[str, dict[int, LivingElement]]:
        """What lives, by job and shard, of which each has one."""
        found: dict[str, dict[int, LivingElement]] = {}
        for element in self.elements:
            found.setdefault(element.submission.job, {})[element.shard] = element
        return found

    def behind(self, job: str, shards: Iterable[int]) -> tuple[Dependency, ...]:
        """What these shards of a job must be sent behind."""
        wanted = set(shards)
        before = (each for each in self.ending if each.submission.job == job and each.shard in wanted)
        return named("afterany", before)


def named(kind: str, elements: Iterable[LivingElement]) -> tuple[Dependency, ...]:
    """Dependencies on these elements alone."""
    indices: dict[str, list[int]] = {}
    for element in elements:
        indices.setdefault(element.submission.name, []).append(element.index)
    return tuple(Dependency(name, kind, tuple(sorted(each))) for name, each in indices.items())


def look(submissions: Sequence[Submission], view: View, limits: Limits) -> Living:
    """The living elements of these submissions whose shards are not done, and those that ended or are ending."""
    elements: list[LivingElement] = []
    record: list[RecordFailure] = []
    ending: list[LivingElement] = []
    failed, broken = _failed(view)
    for submission in submissions:
        ends = _ending(submission, failed, broken, view)
        named_behind = limits.dependencies and submission.id is not None and len(ends) <= MOST_NAMED
        for index, shard in enumerate(submission.shards):
            if shard in view.done.get(submission.job, ()) or (submission.name, index) in view.shared.left:
                continue
            element = LivingElement(submission, index, False, sure=False)
            if index in ends:
                (ending if named_behind else elements).append(element)
            elif (submission.name, index) in failed:
                continue
            elif (found := _alive(element, view, limits)) is None:
                record.append(_record(element, view))
            else:
                elements.append(found)
    return Living(elements, record, ending, broken.keys())


def _alive(element: LivingElement, view: View, limits: Limits) -> LivingElement | None:
    """The element as it lives; None if it is over."""
    submission, index = element.submission, element.index
    state = view.state((submission.name, index))
    if (state is not None and state.alive) or view.queried <= submission.time:
        return replace(element, running=state is not None and state.running, sure=True)
    since = view.over_since.get((submission.name, index), view.now)
    # Time in which the scheduler was not heard says nothing of what it does not know.
    if state is None:
        settled = view.queried - since >= LOST_AFTER
    else:  # what was cancelled because its input failed never ran, and has no files to wait for
        settled = state.kind == "dependency" or view.now - since >= limits.settle
    return None if settled else element


def _record(element: LivingElement, view: View) -> RecordFailure:
    submission, index = element.submission, element.index
    state = view.state((submission.name, index))
    kind = "lost" if state is None else state.kind or "no_sentinel"
    message = state.detail if state is not None and state.detail else KINDS[kind].advice
    node, ran = ("", None) if state is None else (state.node, state.seconds)
    return RecordFailure(submission.name, submission.job, submission.shards[index], index, kind, message, node, ran)


def _failed(view: View) -> tuple[dict[Element, bool], dict[str, set[int]]]:
    """Elements with a recorded failure; True if the driver recorded it, because the scheduler had said that it is over.

    And which indices of which submissions the scheduler counts as failed: not those whose files were damaged afterwards.
    """
    failed: dict[Element, bool] = {}
    broken: dict[str, set[int]] = {}
    for failure in (failure for failures in view.failures.values() for failure in failures):
        if (element := failure.element) is not None:
            failed[element] = failed.get(element, False) or failure.by_driver
            if failure.kind != "damaged":
                broken.setdefault(element[0], set()).add(element[1])
    return failed, broken


def _ending(
    submission: Submission, failed: Mapping[Element, bool], broken: Mapping[str, AbstractSet[int]], view: View
) -> set[int]:
    """Indices of elements that do nothing more of their own, and that the scheduler has not called over."""
    ending: set[int] = set()
    for index in range(len(submission.shards)):
        element = (submission.name, index)
        state = view.state(element)
        if element in failed:
            ends = not failed[element] and not heard_over(state, view.queried, view.failed_since.get(element, 0.0))
        else:
            alive, running = state is not None and state.alive, state is not None and state.running
            may_wait = (alive or view.queried <= submission.time) and not running
            ends = may_wait and _waits_in_vain(submission, index, broken)
        if ends:
            ending.add(index)
    return ending


def _waits_in_vain(submission: Submission, index: int, broken: Mapping[str, AbstractSet[int]]) -> bool:
    """Whether what must succeed first has failed."""
    for dependency in submission.after:
        failed = broken.get(dependency.after, frozenset())
        if dependency.kind == "aftercorr" and index in failed:
            return True
        if dependency.kind == "afterok" and failed and not failed.isdisjoint(dependency.indices or failed):
            return True
    return False
