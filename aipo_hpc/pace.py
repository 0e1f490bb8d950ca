"""How often the scheduler is asked: sites bound the requests of a user, and most news comes from files anyway."""

from collections.abc import Iterable, Mapping, Sequence

from aipo_hpc.clusters import Submission
from aipo_hpc.sentinel import Failure

_BURST = 5
_SPACING = 3.0


class Pace:
    """Asks every ``interval`` seconds, and for a reason sooner, from a bucket of ``_BURST`` that refills as fast."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._tokens = float(_BURST)
        self._asked = float("-inf")

    def allows(self, now: float, urgent: bool) -> bool:
        """Whether to ask at ``now``, in seconds; ``urgent``: an answer is likely to let work go on."""
        since = now - self._asked
        return since >= self._interval or (urgent and since >= _SPACING and self._tokens_at(now) >= 1)

    def asked(self, now: float) -> None:
        """Note that the scheduler was asked."""
        self._tokens = max(0.0, self._tokens_at(now) - 1)
        self._asked = now

    def _tokens_at(self, now: float) -> float:
        if self._interval == 0 or self._asked == float("-inf"):
            return float(_BURST)
        return min(float(_BURST), self._tokens + (now - self._asked) / self._interval)


def doomed(submissions: Sequence[Submission], failures: Mapping[str, Sequence[Failure]]) -> Iterable[tuple[str, int]]:
    """Yield elements (submission, index) that cannot run any more because what they wait for is known to have failed.

    The scheduler cancels them by itself; they are sent again once it has said so.
    """
    failed: dict[str, set[int]] = {}
    for failure in (failure for each in failures.values() for failure in each):
        name, index = failure.attempt.split(".")[:2]
        failed.setdefault(name, set()).add(int(index))
    for submission in submissions:
        for dependency in submission.after:
            broken = failed.get(dependency.after, set())
            hit = broken if dependency.kind == "aftercorr" else range(len(submission.shards)) if broken else ()
            yield from ((submission.name, at) for at in hit if at not in failed.get(submission.name, ()))
