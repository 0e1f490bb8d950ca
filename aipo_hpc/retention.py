"""Which models of a run are kept: the last ones and the best one. Pairs and all other rows always are.

A model goes when nobody in the graph needs it any more: everything that reads it is done, and so is its evaluation. That it
goes is noted first (``JobFolder.prune``), so a crash leaves files that nobody misses, and whoever drives next deletes them.
A job whose model is gone stays done. If something that reads the model has to be computed again, its model has to be first.
"""

from collections.abc import Callable, Collection, Container, Iterable, Mapping
from collections.abc import Set as AbstractSet

from aipo_hpc.durable import visible_size
from aipo_hpc.graph import Edge, Graph
from aipo_hpc.job_folder import JobFolder
from aipo_hpc.journal import Journal
from aipo_hpc.ledger import counts, effort, finished, pruned_models
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.store import Run

MODEL = "model/"


def readers(graph: Graph, name: str) -> list[str]:
    """The jobs that load the model of a job."""
    return [job.name for job in graph.jobs.values() if any(_is_model(edge, name) for edge in job.edges.values())]


def expendable(graph: Graph, done: Container[str], win_rates: Mapping[str, float], keep: int) -> list[str]:
    """The jobs whose trained models may go.

    Kept are the last ``keep`` of the models that are there, the one of the best win rate (of equals the last), and what is
    still read or not yet evaluated.

    Args:
        graph: the jobs.
        done: those of which every shard is finished.
        win_rates: by job, those of the models that were evaluated.
        keep: how many of the last models stay, at least 1.
    """
    trained = [job.name for job in graph.jobs.values() if job.stage == "train" and job.name in done]
    rated = [name for name in trained if name in win_rates]
    best = max(reversed(rated), key=lambda name: win_rates[name], default=None)
    return [
        name
        for name in trained[:-keep]
        if name != best
        and all(reader in done for reader in readers(graph, name))
        and (name in win_rates or not evaluations(graph, name))
    ]


def evaluations(graph: Graph, name: str) -> list[str]:
    """The jobs that judge the answers of the model of a job."""
    read_by = set(readers(graph, name))
    return [
        job.name
        for job in graph.jobs.values()
        if job.stage == "evaluate" and any(edge.job in read_by for edge in job.edges.values())
    ]


def wanted_again(graph: Graph, done: Container[str], pruned: Collection[str]) -> list[str]:
    """Of the jobs whose models were deleted, those that must be computed again: something that is not done reads them.

    Also those whose models are read only to compute the others again.
    """
    again: set[str] = set()
    while True:
        more = {
            name
            for name in pruned
            if name not in again and any(each not in done or each in again for each in readers(graph, name))
        }
        if not more:
            return [name for name in graph.jobs if name in again]
        again |= more


def complete(graph: Graph, done: Mapping[str, Collection[int]]) -> frozenset[str]:
    """The jobs of which every shard is finished."""
    return frozenset(name for name, job in graph.jobs.items() if len(done[name]) == job.num_shards)


def win_rates(run: Run, graph: Graph) -> dict[str, float]:
    """By job, the win rate of the model that it trained, where that was evaluated."""
    return {
        name: counts(run, graph, evaluation)["win_rate"]
        for name, job in graph.jobs.items()
        if job.stage == "train"
        for evaluation in evaluations(graph, name)
        if "win_rate" in counts(run, graph, evaluation)
    }


def take_back(run: Run, graph: Graph, journal: Journal, names: Iterable[str]) -> None:
    """Have these jobs, whose models were deleted, count as not done."""
    for name in names:
        journal.reset([name], reason="its model was deleted and is needed again")
        for shard in finished(run, graph, name):
            run.job(name).retract(shard)


class Retention:
    """Keeps to the number of models for whoever drives; looks closer only when a job has become done, or is not any more."""

    def __init__(self, run: Run, graph: Graph, journal: Journal, tell: Callable[[str], None], keep: int | None) -> None:
        self._run = run
        self._graph = graph
        self._journal = journal
        self._tell = tell
        self._keep = keep
        self._settled: AbstractSet[str] | None = None
        """The jobs that were done when everything was as it should be."""
        self._deleted: set[str] = set()
        """Digests of the sentinels whose models this driver has deleted."""

    def restore(self, done: Mapping[str, Collection[int]]) -> bool:
        """Have deleted models that are needed again computed again; whether there were any."""
        now = complete(self._graph, done)
        if now == self._settled:
            return False
        again = wanted_again(self._graph, now, pruned_models(self._run, self._graph))
        for name in again:
            took = effort(finished(self._run, self._graph, name).values(), self._graph.jobs[name])
            self._tell(
                f"{name}: its model was deleted (keep_models) and is needed again, so it is computed again; the first time "
                f"it took {took['gpu_hours']:.2f} GPU-hours, {took['task_hours']:.2f} task-hours"
            )
        take_back(self._run, self._graph, self._journal, again)
        return bool(again)

    def apply(self, done: Mapping[str, Collection[int]]) -> None:
        """Delete the models that nobody needs any more, and what a driver that was killed left of such."""
        now = complete(self._graph, done)
        if now == self._settled:
            return
        gone = pruned_models(self._run, self._graph)
        going = (
            [] if self._keep is None else expendable(self._graph, now, win_rates(self._run, self._graph), self._keep)
        )
        for name in (name for name in self._graph.jobs if name in gone or name in going):
            for sentinel in finished(self._run, self._graph, name).values():
                if sentinel.digest in self._deleted:
                    continue
                if name not in gone:
                    if not self._successors_are_visible(name):
                        return  # the look is taken again, until they are
                    self._journal.note("prune", job=name, shard=sentinel.shard, digest=sentinel.digest, part=MODEL)
                    self._tell(f"{name}: its model is deleted, nobody needs it any more (keep_models={self._keep})")
                self._run.job(name).prune(sentinel, MODEL)
                self._deleted.add(sentinel.digest)
        self._settled = now

    def _successors_are_visible(self, name: str) -> bool:
        """Whether what was made with a model is to be seen from here, before the model goes."""
        return all(
            _is_visible(self._run.job(reader), sentinel)
            for reader in readers(self._graph, name)
            for sentinel in finished(self._run, self._graph, reader).values()
        )


def _is_visible(folder: JobFolder, sentinel: Sentinel) -> bool:
    """Whether the files of a finished shard are there with their sizes, as far as they are kept."""
    pruned = folder.pruned(sentinel)
    return all(
        visible_size(path) == output.bytes
        for path, output in zip(folder.files(sentinel), sentinel.outputs, strict=True)
        if not (pruned and output.path.startswith(pruned))
    )


def _is_model(edge: Edge, name: str) -> bool:
    return edge.job == name and edge.part == MODEL
