"""The seam to where jobs run: submit shards, tell their states, cancel them.

``states`` and ``cancel`` go by the submissions' names, which are unique, so a submission whose answer was lost is found
again and a scheduler's reused job id is never mistaken for ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aipo_hpc.adjustment import AS_ASKED, Adjustment

if TYPE_CHECKING:
    from aipo_hpc.graph import Graph, Job
    from aipo_hpc.recipe import Recipe
    from aipo_hpc.store import Run


@dataclass(frozen=True)
class Dependency:
    """What must come first of another submission, ``after`` (its name).

    It succeeds as a whole (afterok) or element by element (aftercorr), or it is over (afterany).
    """

    after: str
    kind: str
    indices: tuple[int, ...] = ()
    """The elements meant; none named: all."""


@dataclass(frozen=True)
class Submission:
    """Shards sent to the cluster together; the position in ``shards`` is the index of the array element."""

    name: str
    job: str
    shards: tuple[int, ...]
    after: tuple[Dependency, ...]
    fence: int
    time: float
    id: str | None = None
    """The cluster's id; None while it is not known whether the cluster got it."""
    adjustment: Adjustment = AS_ASKED
    """What is asked for differently than the job's resources and settings say."""
    extra: bool = False
    """Whether its elements do parts of shards that other elements are doing, and are to finish."""


@dataclass(frozen=True)
class TaskState:
    """What the cluster says of one element. Once over, ``kind`` is a class of failure, or None if it ended well."""

    alive: bool
    running: bool = False
    kind: str | None = None
    detail: str = ""
    node: str = ""
    """The node that it runs or ran on; of several, all of them."""
    seconds: float | None = None
    """How long it ran, as far as it is known."""


@dataclass(frozen=True)
class Limits:
    """What a cluster can do. ``cpus`` and ``gpus`` are set where there is no queue that waits for them."""

    dependencies: bool
    max_array_size: int
    settle: float
    """Time in seconds from a task's end until its files must be visible to the driver."""
    query_interval: float
    """Least time in seconds between two queries of the scheduler."""
    cpus: int | None = None
    gpus: int | None = None


class Cluster(Protocol):
    """Where shards are executed."""

    @property
    def limits(self) -> Limits:
        """What this cluster can do."""
        ...

    def check(self, graph: "Graph") -> None:
        """Raise RecipeError or SubmitRefused for a job that this cluster would never run."""
        ...

    def submit(self, run: "Run", job: "Job", submission: Submission, after: Sequence[Submission]) -> str:
        """Send shards off and return the cluster's id for them.

        Raises SubmitRefused when the cluster said no for good, ClusterError when it is not known whether it took them.
        """
        ...

    def states(self, submissions: Sequence[Submission]) -> Mapping[str, Mapping[int, TaskState]]:
        """States by submission name and index, by one query. What the cluster does not know is absent.

        Raises ClusterError when the cluster does not answer: then nothing is known, and nothing is concluded.
        """
        ...

    def cancel(self, submissions: Sequence[Submission]) -> None:
        """Stop the shards of these submissions that still wait or run."""
        ...


def make_cluster(recipe: "Recipe") -> Cluster:
    """The cluster that the recipe names."""
    if recipe.cluster == "slurm":
        from aipo_hpc.clusters.slurm import SlurmCluster

        return SlurmCluster(recipe.slurm)
    if recipe.cluster == "local":
        from aipo_hpc.clusters.local import LocalCluster

        return LocalCluster()
    from aipo_hpc.clusters.inline import InlineCluster

    return InlineCluster()
