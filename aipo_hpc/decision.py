"""What a decision is made from, one look at the world, and what it says: the words of `reconcile`."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from aipo_hpc.adjustment import AS_ASKED, Adjustment
from aipo_hpc.clusters import Dependency, Submission, TaskState
from aipo_hpc.sentinel import Failure

Element = tuple[str, int]
"""A submission's name and an index in it."""


def heard_over(state: TaskState | None, queried: float, failed_since: float) -> bool:
    """Whether the scheduler, asked since an element told its failure, does not call it alive.

    Until then it may still be ending, or the scheduler may have begun it once more.
    """
    return queried >= failed_since and not (state is not None and state.alive)


@dataclass(frozen=True)
class Sharing:
    """What is known of shards that several tasks do together, or could."""

    extra: Sequence[Submission] = ()
    """Submissions of extra tasks for shards that are not done, also those that are over."""
    left: AbstractSet[Element] = frozenset()
    """Extra tasks that are over because nothing was left for them."""
    took: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """How long the finished shards of a job took, in seconds, where its last shards could be shared."""
    unclaimed: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """How many blocks of those last shards nobody has begun."""


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
    shared: Sharing = Sharing()

    def state(self, element: Element) -> TaskState | None:
        """What the scheduler said of an element."""
        return self.states.get(element[0], {}).get(element[1])


@dataclass(frozen=True)
class Submit:
    """Send these shards of a job."""

    job: str
    shards: tuple[int, ...]
    after: tuple[Dependency, ...] = ()
    adjustment: Adjustment = AS_ASKED
    extra: bool = False
    """Each element is one more task for its shard."""


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
