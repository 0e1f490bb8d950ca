"""The shape of one job on a cluster, in Slurm's words."""

from dataclasses import dataclass

from aipo_hpc.settings import tuning


@dataclass(frozen=True)
class Resources:
    """What one shard of a job asks the cluster for. Never part of a job's content."""

    nodes: int = tuning(1)
    """Nodes of one shard (more than one only for training)."""
    tasks_per_node: int = tuning(1)
    """Processes per node; for training, one per GPU."""
    gpus_per_node: int = tuning(0)
    """GPUs per node (0: none)."""
    cpus_per_task: int = tuning(1)
    """CPU cores per process."""
    mem_gb: float | None = tuning(None)
    """Memory per node in GB (None: the partition's default)."""
    time: int = tuning(240)
    """Wall time limit of one shard in minutes."""
    partition: str | None = tuning(None)
    """Partition of this job (None: the run's, slurm.partition)."""
    array_parallelism: int = tuning(256)
    """How many shards of the array may run at once."""
