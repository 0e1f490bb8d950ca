"""Which shards straggle, and how many more tasks are to do what is left of each: a pure function.

The last shards of a job, when all others are done, leave free what these had. A shard that runs much longer than they did is
then shared with extra tasks, once in a launch: they take blocks of it that nobody has begun (``claims.py``), and leave when
there are none. One that fails is not replaced, since its shard's own task does what nobody else does.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import median

from aipo_hpc.clusters import Limits
from aipo_hpc.decision import Submit, View
from aipo_hpc.graph import Job
from aipo_hpc.living import LivingElement

LAST = 0.05
"""Share of a job's shards that are its last ones; one shard is in any case."""
LEAST = 120.0
"""Seconds that a shard must have run: a new task needs its time to begin."""


def last_shards(job: Job, done: Collection[int]) -> list[int]:
    """The shards that are not done, if they are the last few of a job whose shards can be shared; else none."""
    few = 0 < job.num_shards - len(done) <= max(1, LAST * job.num_shards)
    if not few or getattr(job.config, "share_after", None) is None:
        return []
    return [shard for shard in range(job.num_shards) if shard not in done]


def more_tasks(
    job: Job, view: View, alive: Sequence[LivingElement], extra: Sequence[LivingElement], limits: Limits
) -> Iterable[Submit]:
    """The extra tasks to be sent for shards of this job; ``alive`` and ``extra`` are what lives of the whole run."""
    last = last_shards(job, view.done.get(job.name, ()))
    unclaimed: Mapping[int, int] = view.shared.unclaimed.get(job.name, {})
    if not last or not view.shared.took.get(job.name):
        return
    long = max(LEAST, job.config.share_after * median(view.shared.took[job.name]))
    shared = {(each.job, shard) for each in view.shared.extra if each.fence >= view.fence for shard in each.shards}
    straggling = [
        element
        for element in alive
        if element.submission.job == job.name
        and element.running
        and element.shard in last
        and (job.name, element.shard) not in shared
        and unclaimed.get(element.shard, 0) > 1
        and _ran(element, view) > long
    ]
    assert job.resources is not None
    running = sum(element.running for element in alive) + len(extra)
    free = min(job.num_shards, job.resources.array_parallelism) - running
    for number, element in enumerate(straggling):
        share = free // (len(straggling) - number)
        tasks = min(share, unclaimed[element.shard] // 2)
        free -= max(0, tasks)
        for start in range(0, tasks, limits.max_array_size):
            shards = (element.shard,) * min(limits.max_array_size, tasks - start)
            yield Submit(job.name, shards, adjustment=element.submission.adjustment, extra=True)


def _ran(element: LivingElement, view: View) -> float:
    """Seconds for which an element has run: as the scheduler says, or since it was sent where there is no queue."""
    state = view.state((element.submission.name, element.index))
    if state is None or state.seconds is None:
        return view.now - element.submission.time
    return state.seconds + view.now - view.queried
