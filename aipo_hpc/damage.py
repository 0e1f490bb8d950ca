"""Finished work that turned out to be damaged: a worker blames it, whoever drives looks too, and it is made again.

A worker that waited in vain for a sentinel or a payload records a failure that names the shard. One node's word is not
enough, its view may be stale: the driver looks with its own eyes, and only what is wrong for both counts as damaged. Its
attempt is then recorded as failed, of a class with a budget of its own, and its sentinel set aside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aipo_hpc.graph import Graph
from aipo_hpc.sentinel import Blame, Failure
from aipo_hpc.store import Run


@dataclass(frozen=True)
class Damage:
    """A shard that counted as done and is not: the attempt that made it, and what is wrong."""

    job: str
    shard: int
    attempt: str
    message: str


class Inspector:
    """Looks at what workers blame; remembers what it has judged, since a look may mean to hash a large model."""

    def __init__(self, run: Run, graph: Graph) -> None:
        self._run = run
        self._graph = graph
        self._judged: set[tuple[str, Blame]] = set()

    def look(self, failures: Mapping[str, Sequence[Failure]]) -> list[Damage]:
        """The damaged among the shards that these failures blame and that nobody has judged yet."""
        blamed: dict[Blame, None] = {}
        for failure in (failure for each in failures.values() for failure in each):
            for blame in failure.blames:
                if (failure.attempt, blame) not in self._judged and blame.job in self._graph.jobs:
                    self._judged.add((failure.attempt, blame))
                    blamed[blame] = None
        found = {(each.job, each.shard): each for each in map(self._judge, blamed) if each is not None}
        return list(found.values())

    def _judge(self, blame: Blame) -> Damage | None:
        folder = self._run.job(blame.job)
        fingerprint = self._graph.fingerprints[blame.job]
        # What was read long ago says nothing of the file as it is now.
        remembered = folder.forget(blame.shard)
        standing = folder.done(fingerprint, only=(blame.shard,)).get(blame.shard)
        if standing is None:
            if remembered is None:
                return None  # known not to be done
            return Damage(blame.job, blame.shard, remembered.attempt, "its sentinel is damaged or gone")
        if blame.digest != standing.digest:
            return None  # made again since, or the worker had not seen it yet
        wrong = folder.damage(standing)
        return None if wrong is None else Damage(blame.job, blame.shard, standing.attempt, wrong)


def answerable(failures: Mapping[str, Sequence[Failure]]) -> Mapping[str, Sequence[Failure]]:
    """The failures without those of workers that were right: what they blamed was found damaged afterwards.

    Neither the node on which such a worker ran nor its own shard has anything to do with it.
    """
    damaged: dict[tuple[str, int], float] = {}
    for job, each in failures.items():
        for failure in each:
            if failure.kind == "damaged":
                damaged[job, failure.shard] = max(failure.time, damaged.get((job, failure.shard), 0.0))
    if not damaged:
        return failures

    def right(failure: Failure) -> bool:
        return any(failure.time <= damaged.get((blame.job, blame.shard), -1.0) for blame in failure.blames)

    return {job: [failure for failure in each if not right(failure)] for job, each in failures.items()}
