"""Rank the candidates of each prompt: Responses -> Ranked.

Prompts are ranked a few at a time and kept as they are done, so a killed attempt costs seconds. What is ranked together
stays together in a later attempt, so that a ranker whose arithmetic depends on the batch gives the same scores. A prompt
without candidates, or one the ranker cannot judge, becomes a row with an error and no scores; it never stops the shard. Every
score of every ranker is kept, so that choosing other pairs never ranks again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from aipo_hpc import leaving
from aipo_hpc.blocks import Blocks
from aipo_hpc.progress import ROWS, Progress
from aipo_hpc.rankers import NOT_FINITE, Ranking, failed, load_ranker
from aipo_hpc.rankers.config import RankerConfig
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Opinion, Ranked, Responses, read_rows
from aipo_hpc.settings import tuning
from aipo_hpc.suspects import Suspects
from aipo_hpc.task import Outcome, Task


@dataclass(frozen=True)
class RankConfig(RankerConfig):
    """Settings of the rank stage."""

    num_shards: int | None = None
    """Shards of the job (None: as many as generate, because rank shard i reads generate shard i)."""
    share_after: float | None = tuning(1.5)
    """As ``generate.share_after``."""
    resources: Resources = tuning(Resources(gpus_per_node=1))
    """What one shard asks the cluster for."""


def run(config: RankConfig, task: Task) -> Outcome:
    """Rank the inputs' prompts with the models in the inputs ``ranker...``, in the order of ``rows.parquet``.

    Raises:
        RecipeError: an unknown ranker or dtype, or a ranker whose package is not installed.
        DataError: a ranker's model cannot be used.
    """
    responses = list(read_rows(task.inputs["responses"].named(ROWS), Responses))
    suspects = Suspects(task)
    with Progress(task, Ranked) as progress:
        for row in responses:
            if row.error is not None and row.prompt_id not in progress:
                progress.append(_ranked(row, failed(row.error), []))
        rank_all(config, task, [row for row in responses if row.error is None], progress, suspects)
        prompt_ids = [row.prompt_id for row in responses]
        outputs = progress.finish(prompt_ids)
        counts = count(list(progress.rows(prompt_ids)))
    return Outcome(rows=len(responses), outputs=outputs, counts={**counts, **suspects.counts, **progress.counts})


def rank_all(
    config: RankerConfig, task: Task, rows: Sequence[Responses], progress: Progress[Ranked], suspects: Suspects
) -> None:
    """Have a ranking of each row in ``progress``, by the models in the inputs ``ranker...``.

    Raises Left if this process was asked to leave before that.
    """
    to_rank = {row.prompt_id: row for row in rows}
    for prompt_id in suspects.guilty:
        if prompt_id in to_rank and prompt_id not in progress:
            progress.append(_ranked(to_rank[prompt_id], failed(suspects.reason), []))
    if all(prompt_id in progress for prompt_id in to_rank):
        return
    models = {name: task.inputs[name].model for name in task.inputs if name.startswith("ranker")}
    ranker = load_ranker(config, models, task.seed)
    blocks = Blocks(task, list(_chunks(list(to_rank), ranker.prompts_per_call)), progress, suspects)
    for chunk in ([to_rank[each] for each in batch] for batches in blocks.rounds() for batch in batches):
        leaving.here(f"{task.job} shard {task.shard}")
        suspects.begin([row.prompt_id for row in chunk])
        for row, ranking in zip(chunk, ranker.rank(chunk), strict=True):
            if row.prompt_id not in progress:
                progress.append(_ranked(row, ranking, opinions(config.ranker, ranking)))


def opinions(ranker: str, ranking: Ranking) -> list[Opinion]:
    """What each ranker said: the members of an ensemble, or the one that ``ranker`` names."""
    return [
        Opinion(
            name,
            list(said.scores),
            said.prompt_truncated,
            said.replies,
            said.unparsable,
            said.ties,
            said.contradictions,
            said.error,
        )
        for name, said in (ranking.members or {ranker: ranking}).items()
    ]


def count(rows: Sequence[Ranked]) -> dict[str, float]:
    """Count what a reader of the report wants to know, from the finished rows, so an interruption changes nothing."""
    texts = [[candidate.response for candidate in row.candidates] for row in rows]
    said = [opinion for row in rows for opinion in row.opinions]
    counted = {
        "replies": sum(opinion.replies for opinion in said),
        "unparsable": sum(opinion.unparsable for opinion in said),
        "ties": sum(opinion.ties for opinion in said),
        "contradictions": sum(opinion.contradictions for opinion in said),
    }
    return {
        "prompts": len(rows),
        "ranked": sum(row.error is None for row in rows),
        "errors": sum(row.error is not None for row in rows),
        "non_finite": sum(opinion.error == NOT_FINITE for opinion in said),
        "candidates": sum(map(len, texts)),
        "truncated_candidates": sum(sum(row.truncated) for row in rows),
        "truncated_prompts": sum(any(opinion.prompt_truncated for opinion in row.opinions) for row in rows),
        "empty_candidates": sum(not text.strip() for responses in texts for text in responses),
        "identical": sum(len(responses) > 1 and len(set(responses)) == 1 for responses in texts),
        "single": sum(len(responses) == 1 for responses in texts),
        **(counted if counted["replies"] else {}),
    }


def _ranked(row: Responses, ranking: Ranking, said: list[Opinion]) -> Ranked:
    return Ranked(
        prompt_id=row.prompt_id,
        prompt=row.prompt,
        messages=row.messages,
        candidates=row.candidates,
        scores=list(ranking.scores),
        ranks=list(ranking.ranks),
        truncated=list(ranking.truncated),
        error=ranking.error,
        opinions=said,
    )


def _chunks(prompt_ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(prompt_ids), size):
        yield prompt_ids[start : start + size]
