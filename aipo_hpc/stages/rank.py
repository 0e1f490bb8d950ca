"""Rank the candidates of each prompt: Responses -> Ranked.

Prompts are ranked a few at a time and kept as they are done, so a killed attempt costs seconds. A prompt without
candidates, or one the ranker cannot judge, becomes a row with an error and no scores; it never stops the shard.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from aipo_hpc.progress import ROWS, Progress
from aipo_hpc.rankers import NOT_FINITE, Ranking, load_ranker
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Ranked, Responses, read_rows
from aipo_hpc.settings import memory_bound, tuning
from aipo_hpc.task import Outcome, Task

_PROMPTS_PER_CHUNK = 16
"""Enough comparisons to fill batches of equal length, few enough to lose little to a kill."""


@dataclass(frozen=True)
class RankConfig:
    """Settings of the rank stage."""

    ranker: str = "pairrm"
    """Which ranker: pairrm, or llm_blender (the same model through its authors' package, slower)."""
    model_name_or_path: str = ""
    """The ranker's checkpoint: a folder or a model id on the hub, e.g. llm-blender/PairRM."""
    revision: str | None = None
    """Branch, tag or commit of the checkpoint on the hub (None: its main branch)."""
    dtype: str = "float32"
    """Precision of the encoder: float32 (the reference), bfloat16 or float16 (faster, change some ranks)."""
    tokens_per_batch: int | None = memory_bound(None, unset=2048)
    """Tokens of one forward pass, padding included (None: 2048 on a CPU, 16384 on a GPU)."""
    num_shards: int | None = None
    """Shards of the job (None: as many as generate, because rank shard i reads generate shard i)."""
    resources: Resources = tuning(Resources(gpus_per_node=1))
    """What one shard asks the cluster for."""


def run(config: RankConfig, task: Task) -> Outcome:
    """Rank the inputs' prompts with the ranker in ``task.inputs["ranker"]``, in the order of ``rows.parquet``.

    Raises:
        RecipeError: an unknown ranker or dtype, or a ranker whose package is not installed.
        DataError: the ranker's checkpoint cannot be used.
    """
    responses = list(read_rows(task.inputs["responses"].named(ROWS), Responses))
    with Progress(task, Ranked) as progress:
        open_rows = [row for row in responses if row.prompt_id not in progress]
        for row in open_rows:
            if row.error is not None:
                progress.append(_ranked(row, Ranking((), (), (), error=row.error)))
        to_rank = [row for row in open_rows if row.error is None]
        if to_rank:
            ranker = load_ranker(
                config.ranker,
                task.inputs["ranker"].model,
                revision=config.revision,
                dtype=config.dtype,
                tokens_per_batch=config.tokens_per_batch,
            )
            for chunk in _chunks(to_rank):
                texts = [[candidate.response for candidate in row.candidates] for row in chunk]
                for row, ranking in zip(chunk, ranker.rank([row.prompt for row in chunk], texts), strict=True):
                    progress.append(_ranked(row, ranking))
        prompt_ids = [row.prompt_id for row in responses]
        outputs = progress.finish(prompt_ids)
        counts = count(list(progress.rows(prompt_ids)))
    return Outcome(rows=len(responses), outputs=outputs, counts=counts)


def count(rows: Sequence[Ranked]) -> dict[str, float]:
    """Count what a reader of the report wants to know, from the finished rows, so an interruption changes nothing."""
    texts = [[candidate.response for candidate in row.candidates] for row in rows]
    return {
        "prompts": len(rows),
        "ranked": sum(row.error is None for row in rows),
        "errors": sum(row.error is not None for row in rows),
        "non_finite": sum(row.error == NOT_FINITE for row in rows),
        "candidates": sum(map(len, texts)),
        "truncated_candidates": sum(sum(row.truncated) for row in rows),
        "empty_candidates": sum(not text.strip() for responses in texts for text in responses),
        "identical": sum(len(responses) > 1 and len(set(responses)) == 1 for responses in texts),
        "single": sum(len(responses) == 1 for responses in texts),
    }


def _ranked(row: Responses, ranking: Ranking) -> Ranked:
    return Ranked(
        prompt_id=row.prompt_id,
        prompt=row.prompt,
        messages=row.messages,
        candidates=row.candidates,
        scores=list(ranking.scores),
        ranks=list(ranking.ranks),
        truncated=list(ranking.truncated),
        error=ranking.error,
    )


def _chunks(rows: Sequence[Responses]) -> Iterator[Sequence[Responses]]:
    for start in range(0, len(rows), _PROMPTS_PER_CHUNK):
        yield rows[start : start + _PROMPTS_PER_CHUNK]
