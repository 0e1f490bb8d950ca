"""What files and journal tell of shards that several tasks do together, or could; and the end of tasks not needed any more."""

from collections.abc import Callable, Mapping

from aipo_hpc.claims import left, unclaimed
from aipo_hpc.clusters import Cluster, Submission
from aipo_hpc.decision import Sharing
from aipo_hpc.errors import ClusterError
from aipo_hpc.graph import Graph
from aipo_hpc.journal import Journal
from aipo_hpc.leftovers import last_shards
from aipo_hpc.sentinel import Sentinel, element_of
from aipo_hpc.store import Run


class SharedShards:
    """The shared shards of a run, as its driver sees them."""

    def __init__(self, run: Run, graph: Graph, journal: Journal, cluster: Cluster, tell: Callable[[str], None]) -> None:
        self._run = run
        self._graph = graph
        self._journal = journal
        self._cluster = cluster
        self._tell = tell
        self._extra: dict[str, Submission] = {}

    def look(self, done: Mapping[str, Mapping[int, Sentinel]]) -> Sharing:
        """How things stand: a listing for each of the last shards of a job, and for each that has extra tasks."""
        extra = {
            name: each
            for name, each in self._journal.submissions.items()
            if each.extra and each.job in self._graph.jobs and not set(each.shards) <= done[each.job].keys()
        }
        self._dismiss([each for name, each in self._extra.items() if name not in extra])
        self._extra = extra
        ended = {
            element
            for each in extra.values()
            for attempt in left(self._run.job(each.job), each.shards[0])
            if (element := element_of(attempt)) is not None and element[0] == each.name
        }
        took: dict[str, list[float]] = {}
        open_blocks: dict[str, dict[int, int]] = {}
        for name, job in self._graph.jobs.items():
            if done[name] and (shards := last_shards(job, done[name])):
                took[name] = [each.ended - each.started for each in done[name].values()]
                open_blocks[name] = {shard: unclaimed(self._run.job(name), shard) for shard in shards}
        return Sharing(tuple(extra.values()), ended, took, open_blocks)

    def _dismiss(self, needless: list[Submission]) -> None:
        """End the extra tasks of shards that are done: some may wait, or do what nobody needs."""
        if not needless:
            return
        try:
            self._cluster.cancel(needless)
        except ClusterError as error:
            self._tell(f"extra tasks of finished shards end by themselves, once they have begun: {error}")
