"""clusters: Prompt -> Clustered. The seed pool in clusters of like prompts, by k-means; done once, read by every shard.

Deterministic: the first centres are drawn with the run's seed, and sums run in one thread, in one order. Clusters are
numbered by size, the largest first.
"""

from collections import Counter
from dataclasses import dataclass

from aipo_hpc.embeddings import EMBEDDINGS
from aipo_hpc.errors import DataError
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Clustered, Prompt, read_rows, write_rows
from aipo_hpc.settings import tuning
from aipo_hpc.task import Outcome, Task

CLUSTERS = "clusters.parquet"


@dataclass(frozen=True)
class ClustersConfig:
    """Clusters of the seed pool, one of which each call of self-instruct draws its seeds from."""

    num_clusters: int = 0
    """Clusters (0: none, seeds are drawn from the whole pool)."""
    embeddings: str = "tf-idf"
    """What prompts are compared by: tf-idf (their words), sentence-transformers, or bert (mean of the last states)."""
    model_name_or_path: str = ""
    """The model of the embeddings, a path or hub name (not for tf-idf)."""
    revision: str | None = None
    """Revision of the model on the hub."""
    n_init: int = 1
    """How often k-means starts, from other centres each time; the best result is taken."""
    max_iter: int = 300
    """Most steps of k-means."""
    batch_size: int = 64
    """Prompts per batch of the embeddings (floating-point results depend on it)."""
    resources: Resources = tuning(Resources(cpus_per_task=4, time=120))


def run(config: ClustersConfig, task: Task) -> Outcome:
    """Cluster the input ``pool``. Raises DataError when it has fewer prompts than there are to be clusters."""
    import numpy as np
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    pool = list(read_rows(task.inputs["pool"].files, Prompt))
    if len(pool) < config.num_clusters:
        raise DataError(
            f"{task.job}: {len(pool)} seed prompts cannot make clusters.num_clusters={config.num_clusters} clusters. "
            "Lower it or give more prompts."
        )
    model = task.inputs["embedder"].model if "embedder" in task.inputs else ""
    vectors = EMBEDDINGS[config.embeddings]([prompt.prompt for prompt in pool], model, config.batch_size)
    with threadpool_limits(1):
        means = KMeans(
            config.num_clusters, n_init=config.n_init, max_iter=config.max_iter, random_state=task.seed % 2**32
        )
        labels = means.fit_predict(vectors).tolist()
    by_size = sorted(Counter(labels).items(), key=lambda each: (-each[1], each[0]))
    numbers = {label: number for number, (label, _) in enumerate(by_size)}
    rows = [Clustered(prompt.prompt_id, numbers[label]) for prompt, label in zip(pool, labels, strict=True)]
    write_rows(task.out / CLUSTERS, rows, Clustered)
    sizes = [size for _, size in by_size]
    counts = {
        "clusters": len(sizes),
        "largest": sizes[0],
        "median": float(np.median(sizes)),
        "smallest": sizes[-1],
        "inertia": float(means.inertia_),
    }
    return Outcome(len(rows), (CLUSTERS,), counts)
