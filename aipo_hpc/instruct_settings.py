"""Settings of self-instruct that do not make sense, told before anything is submitted."""

import importlib.util

from aipo_hpc.embeddings import EMBEDDINGS
from aipo_hpc.engines import DTYPES
from aipo_hpc.errors import RecipeError
from aipo_hpc.stages.clusters import ClustersConfig
from aipo_hpc.stages.generate import GenerateConfig
from aipo_hpc.stages.instruct import InstructConfig

COUNTS = ("num_shards", "num_prompts", "num_seeds", "tasks_per_call", "max_tokens", "max_prompt_tokens", "batch_size")
"""Fields that are at least 1."""


def unfit_settings(
    config: InstructConfig, clusters: ClustersConfig, generate: GenerateConfig
) -> list[tuple[bool, str]]:
    """What may be wrong with the settings: whether it is, and what to say then."""
    capacity = (config.num_per_cluster or 0) * clusters.num_clusters
    return [
        (
            generate.num_prompts is not None,
            f"generate.num_prompts={generate.num_prompts}: with self-instruct, instruct.num_prompts tells how many "
            "prompts an iteration has. Leave it unset (None).",
        ),
        (not config.temperature > 0, f"instruct.temperature={config.temperature}: must be above 0."),
        (not 0 < config.top_p <= 1, f"instruct.top_p={config.top_p}: must be in (0, 1]."),
        (config.top_k < 0, f"instruct.top_k={config.top_k}: must be 0 (all tokens) or more."),
        (config.dtype not in DTYPES, f"instruct.dtype={config.dtype!r}: must be one of {', '.join(DTYPES)}."),
        (
            not 0 <= config.num_machine_seeds <= config.num_seeds,
            f"instruct.num_machine_seeds={config.num_machine_seeds}: must be between 0 and "
            f"instruct.num_seeds={config.num_seeds}.",
        ),
        (
            not 0 < config.near_duplicate <= 1,
            f"instruct.near_duplicate={config.near_duplicate}: must be in (0, 1]; 1 finds only the same words.",
        ),
        (config.surplus < 0, f"instruct.surplus={config.surplus}: must be 0 or more."),
        (not 0 <= config.min_share <= 1, f"instruct.min_share={config.min_share}: must be between 0 and 1."),
        (
            not config.max_calls_per_prompt * config.tasks_per_call >= 1,
            f"instruct.max_calls_per_prompt={config.max_calls_per_prompt}: too few calls to make a prompt each.",
        ),
        (
            config.max_task_tokens < config.min_task_tokens,
            f"instruct.max_task_tokens={config.max_task_tokens}: is below instruct.min_task_tokens="
            f"{config.min_task_tokens}.",
        ),
        (
            clusters.embeddings not in EMBEDDINGS,
            f"clusters.embeddings={clusters.embeddings!r}: must be one of {', '.join(EMBEDDINGS)}.",
        ),
        (
            bool(clusters.num_clusters) and bool(clusters.model_name_or_path) != (clusters.embeddings != "tf-idf"),
            f"clusters.model_name_or_path={clusters.model_name_or_path!r}: clusters.embeddings={clusters.embeddings} "
            f"{'has no model' if clusters.embeddings == 'tf-idf' else 'needs one, a path or hub name'}.",
        ),
        (
            config.num_per_cluster is not None and capacity < config.num_prompts,
            f"instruct.num_per_cluster={config.num_per_cluster} of clusters.num_clusters={clusters.num_clusters} makes "
            f"{capacity} prompts at most, instruct.num_prompts={config.num_prompts} are asked for. Raise one of the two.",
        ),
        (
            config.num_per_cluster is not None and clusters.num_clusters < config.num_shards,
            f"instruct.num_shards={config.num_shards}: with instruct.num_per_cluster, every shard needs a cluster of its own, "
            f"and there are clusters.num_clusters={clusters.num_clusters}.",
        ),
    ]


def refuse_missing_libraries(config: InstructConfig, clusters: ClustersConfig) -> None:
    """Raise RecipeError for libraries that the settings need and that are not installed."""
    needed = ["datasketch"] if config.near_duplicate < 1 else []
    if clusters.num_clusters and clusters.embeddings == "sentence-transformers":
        needed.append("sentence_transformers")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"instruct needs {' and '.join(missing)}, not installed here: pip install 'aipo_hpc[instruct]'. Without: "
            "instruct.near_duplicate=1 drops exact repetitions only, clusters.embeddings=tf-idf or bert need no other library."
        )
