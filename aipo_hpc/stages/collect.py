"""collect: NewPrompt -> Prompt. The prompts of self-instruct's shards in one file, as many as the recipe asks for.

The first prompts of all shards come first, then the second ones, and so on; what repeats an earlier one, word for word or
nearly, is left out, and the rest is cut to exactly ``num_prompts``. (What they repeat of the pool, of held-out prompts and of
earlier iterations, the shards have left out already.) If there are fewer, the run goes on with those, down to ``min_share``.

Files: ``prompts.parquet`` (Prompt rows), ``dropped.parquet``.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from aipo_hpc.deduplication import Seen
from aipo_hpc.errors import DataError
from aipo_hpc.harvest import DROPPED, DroppedTask
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Message, NewPrompt, Prompt, read_rows, write_rows
from aipo_hpc.settings import tuning
from aipo_hpc.task import Outcome, Task

PROMPTS = "prompts.parquet"


@dataclass(frozen=True)
class CollectConfig:
    """How many prompts there are to be; told by the settings of instruct."""

    num_prompts: int = 1
    near_duplicate: float = 0.7
    min_share: float = 0.0
    resources: Resources = tuning(Resources(cpus_per_task=2, time=60))


def run(config: CollectConfig, task: Task) -> Outcome:
    """Put the shards of the input ``new`` together. Raises DataError if there are too few prompts, and says how many."""
    shards = task.inputs["new"].shards
    found = interleaved([list(read_rows(shards[shard], NewPrompt)) for shard in sorted(shards)])
    kept, dropped = distinct(found, config)
    if len(kept) < config.min_share * config.num_prompts:
        raise DataError(
            f"{task.job}: self-instruct made {len(kept)} prompts, which is less than instruct.min_share={config.min_share:g} "
            f"of instruct.num_prompts={config.num_prompts}; why tasks were dropped is in the report. Raise "
            "instruct.max_calls_per_prompt, loosen the filters (instruct.*), or lower instruct.min_share."
        )
    prompts = [Prompt(row.prompt_id, row.prompt, [Message("user", row.prompt)]) for row in kept]
    write_rows(task.out / PROMPTS, prompts, Prompt)
    write_rows(task.out / DROPPED, dropped, DroppedTask)
    reasons = sorted(Counter(drop.reason for drop in dropped).items())
    counts = {
        "wanted": config.num_prompts,
        "kept": len(kept),
        **{f"dropped_{reason}": number for reason, number in reasons},
    }
    return Outcome(len(kept), (PROMPTS, DROPPED), counts)


def interleaved(shards: Sequence[Sequence[NewPrompt]]) -> list[NewPrompt]:
    """The first of every shard, the second of every shard, ..."""
    return [row for row in chain.from_iterable(zip_longest(*shards)) if row is not None]


def distinct(rows: Iterable[NewPrompt], config: CollectConfig) -> tuple[list[NewPrompt], list[DroppedTask]]:
    """The first ``num_prompts`` rows that repeat none before them, and what was dropped."""
    seen = Seen(config.near_duplicate)
    kept: list[NewPrompt] = []
    dropped: list[DroppedTask] = []
    for row in rows:
        match = seen.match(row.prompt)
        if match is not None:
            reason = "same_as_new" if match.exact else "nearly_same_as_new"
        elif len(kept) == config.num_prompts:
            reason = "surplus"
        else:
            seen.remember([row.prompt], "new")
            kept.append(row)
            continue
        dropped.append(DroppedTask(row.call_id, row.prompt, reason))
    return kept, dropped
