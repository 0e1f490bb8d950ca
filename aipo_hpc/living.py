"""Which elements of submissions wait or run, and which ended without a word: files and scheduler put together."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from aipo_hpc.clusters import Limits, Submission
from aipo_hpc.decision import Element, RecordFailure, View
from aipo_hpc.failures import KINDS
from aipo_hpc.sentinel import Failure

LOST_AFTER = 60.0
"""Seconds for which an element must be unknown to the scheduler before it counts as lost."""


class LivingElement(NamedTuple):
    """What computes a shard. Not ``sure``: it ended, or is not known, and files or scheduler may yet tell more."""

    submission: Submission
    shard: int
    running: bool
    sure: bool = True


Living = dict[str, dict[int, LivingElement]]
"""By job and shard."""


def look(
    submissions: Sequence[Submission], view: View, limits: Limits
) -> tuple[list[LivingElement], list[RecordFailure]]:
    """The living elements of these submissions whose shards are not done, and those that ended without a word."""
    alive: list[LivingElement] = []
    record: list[RecordFailure] = []
    over = _over(failure for failures in view.failures.values() for failure in failures)
    for submission in submissions:
        states = view.states.get(submission.name, {})
        for index, shard in enumerate(submission.shards):
            if shard in view.done.get(submission.job, ()):
                continue
            state = states.get(index)
            if (by_driver := over.get((submission.name, index))) is not None:
                # A task that said why it failed may still be ending, or the scheduler may have begun it once more.
                heard = view.queried >= view.failed_since.get((submission.name, index), 0.0)
                if not by_driver and (not heard or (state is not None and state.alive)):
                    alive.append(LivingElement(submission, shard, False, sure=False))
                continue
            if (state is not None and state.alive) or view.queried <= submission.time:
                running = state is not None and state.running
                alive.append(LivingElement(submission, shard, running))
                continue
            since = view.over_since.get((submission.name, index), view.now)
            # Time in which the scheduler was not heard says nothing of what it does not know.
            if state is None:
                settled = view.queried - since >= LOST_AFTER
            else:  # what was cancelled because its input failed never ran, and has no files to wait for
                settled = state.kind == "dependency" or view.now - since >= limits.settle
            if not settled:
                alive.append(LivingElement(submission, shard, False, sure=False))
                continue
            kind = "lost" if state is None else state.kind or "no_sentinel"
            message = state.detail if state is not None and state.detail else KINDS[kind].advice
            node, ran = ("", None) if state is None else (state.node, state.seconds)
            record.append(RecordFailure(submission.name, submission.job, shard, index, kind, message, node, ran))
    return alive, record


def by_shard(elements: Iterable[LivingElement]) -> Living:
    """The same by job and shard, of which each has one."""
    found: Living = {}
    for element in elements:
        found.setdefault(element.submission.job, {})[element.shard] = element
    return found


def _over(failures: Iterable[Failure]) -> dict[Element, bool]:
    """Elements with a recorded failure; True if the driver recorded it, because the scheduler had said that it is over."""
    found: dict[tuple[str, int], bool] = {}
    for failure in failures:
        if (element := failure.element) is not None:
            found[element] = found.get(element, False) or failure.by_driver
    return found
