"""Score pairs under the reference model: rows.Pair -> rows.TrainRow.

Chosen and rejected responses become token ids here, once, and their summed log-probabilities under the reference are
stored beside the ids, so that training needs no second model and trains on exactly what was scored.

    in    pairs       pairs.parquet, all pairs; shard s of S takes pairs [s*N//S, (s+1)*N//S)
          reference   the model that training holds on to: the iteration's own policy, or another of the same tokens
          policy      the model that is trained next; its tokenizer makes the ids
    out   rows.parquet   one TrainRow per pair, in the order of the pairs; one that cannot be scored has an error and NaN
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aipo_hpc import leaving
from aipo_hpc.blocks import Blocks
from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.progress import Progress
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Pair, TrainRow, read_rows
from aipo_hpc.settings import memory_bound, tuning
from aipo_hpc.suspects import Suspects
from aipo_hpc.task import Outcome, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGPS = ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_shared_logps", "ref_rejected_shared_logps")


@dataclass(frozen=True)
class ReferenceConfig:
    """Settings of the reference stage."""

    model: str = "previous"
    """The reference of every iteration: previous (the model that the iteration starts from), initial (the one that the run
    starts from), or the path or hub name of another model with the same tokens."""
    revision: str | None = None
    """Revision of that other model on the hub."""
    num_shards: int = tuning(4)
    """Shards that the pairs are divided into."""
    dtype: str = "bfloat16"
    """Number format the reference is loaded and run in: bfloat16 or float32. Use the one that training uses."""
    tokens_per_batch: int = memory_bound(16384)
    """Tokens of one forward pass, padding included; a pair longer than that is a batch of its own."""
    share_after: float | None = tuning(1.5)
    """As ``generate.share_after``."""
    resources: Resources = tuning(Resources(gpus_per_node=1, cpus_per_task=4, time=120))
    """What one shard asks the cluster for."""

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise RecipeError(f"reference.dtype={self.dtype!r} is not supported: choose bfloat16 or float32.")
        if self.num_shards < 1 or self.tokens_per_batch < 1:
            raise RecipeError(
                f"reference.num_shards={self.num_shards} and reference.tokens_per_batch={self.tokens_per_batch} "
                "must both be at least 1."
            )


def run(config: ReferenceConfig, task: Task) -> Outcome:
    """Tokenise and score this shard's pairs. One that cannot be scored becomes a row with an error.

    Raises DataError if the model cannot be loaded, or if not one pair of a shard that has some could be scored.
    """
    pairs = _slice(list(read_rows(task.inputs["pairs"].named("pairs.parquet"), Pair)), task)
    prompt_ids = [pair.prompt_id for pair in pairs]
    suspects = Suspects(task)
    with Progress(task, TrainRow) as progress:
        if any(prompt_id not in progress for prompt_id in prompt_ids):
            _score_all(config, task, pairs, progress, suspects)
        outputs = progress.finish(prompt_ids)
        rows = list(progress.rows(prompt_ids))
    scored = [row for row in rows if row.error is None]
    if rows and not scored:
        raise DataError(
            f"{task.job}: none of the {len(rows)} pairs of shard {task.shard} could be scored; the first failed "
            f"with: {rows[0].error}"
        )
    counts = {"pairs": len(scored), "tokens": sum(map(_num_tokens, scored)), "errors": len(rows) - len(scored)}
    return Outcome(len(rows), outputs, {**counts, **suspects.counts, **progress.counts})


def _slice(pairs: list[Pair], task: Task) -> list[Pair]:
    """This shard's contiguous part. Raises DataError if a prompt has two pairs: rows are kept by prompt."""
    if len({pair.prompt_id for pair in pairs}) != len(pairs):
        raise DataError(f"{task.job}: some prompt_id has more than one pair; keep one pair per prompt_id.")
    return pairs[task.shard * len(pairs) // task.num_shards : (task.shard + 1) * len(pairs) // task.num_shards]


def _score_all(
    config: ReferenceConfig, task: Task, pairs: Sequence[Pair], progress: Progress[TrainRow], suspects: Suspects
) -> None:
    """Have a row in ``progress`` for each pair."""
    from aipo_hpc.chat import load_tokenizer, refuse_other_tokens

    model_name, policy = task.inputs["reference"].model, task.inputs["policy"].model
    if model_name != policy:
        refuse_other_tokens(policy, model_name)
    tokenizer = load_tokenizer(policy)
    named: dict[str, TrainRow] = {}
    for pair in pairs:
        row = _tokenise(tokenizer, pair)
        if row.error is None:
            named[pair.prompt_id] = row
            row = replace(row, error=suspects.reason if pair.prompt_id in suspects.guilty else None)
        if row.error is not None and row.prompt_id not in progress:
            progress.append(row)
    # Batches are made of all pairs, finished ones too: what a pair is padded with must not depend on interruptions.
    batches = [[row.prompt_id for row in batch] for batch in _batches(list(named.values()), config.tokens_per_batch)]
    model: Any = None
    for batch in (batch for batches in Blocks(task, batches, progress, suspects).rounds() for batch in batches):
        leaving.here(f"{task.job} shard {task.shard}")
        model = model or _load(model_name, config.dtype)
        suspects.begin(batch)
        for row in _score(model, [named[prompt_id] for prompt_id in batch]):
            if row.prompt_id not in progress:
                progress.append(row)


def _tokenise(tokenizer: "PreTrainedTokenizerBase", pair: Pair) -> TrainRow:
    """The pair as token ids, log-probabilities still to come; or what is wrong with it."""
    from jinja2 import TemplateError

    from aipo_hpc.chat import prompt_ids, response_ids

    ids: list[list[int]] = [[], [], []]
    error = None
    try:
        ids[0] = prompt_ids(tokenizer, pair.messages)
        ids[1:] = (
            response_ids(tokenizer, candidate.response, candidate.finish_reason)
            for candidate in (pair.chosen, pair.rejected)
        )
        empty = [name for name, each in zip(("prompt", "chosen", "rejected"), ids, strict=True) if not each]
        error = f"{empty[0]} has no tokens" if empty else None
    except (TemplateError, ValueError, TypeError, KeyError) as raised:
        error = f"cannot be tokenised: {type(raised).__name__}: {raised}"
    nan = math.nan
    return TrainRow(pair.prompt_id, ids[0], ids[1], ids[2], nan, nan, nan, nan, error)


def _batches(rows: Sequence[TrainRow], tokens_per_batch: int) -> Iterator[list[TrainRow]]:
    """Rows of similar length together, longest first, so that what does not fit into memory fails at once."""
    batch: list[TrainRow] = []
    width = 0
    for row in sorted(rows, key=lambda row: (-_longest(row), row.prompt_id)):
        if batch and 2 * width * (len(batch) + 1) > tokens_per_batch:
            yield batch
            batch = []
        width = width if batch else _longest(row)
        batch.append(row)
    if batch:
        yield batch


def _load(model_name: str, dtype: str) -> Any:
    """The model, ready to be run: over all visible GPUs, or on the CPU."""
    import torch

    from aipo_hpc.model_files import load_model

    if torch.cuda.device_count() > 1:
        return load_model(model_name, getattr(torch, dtype), device_map="auto").eval()
    model = load_model(model_name, getattr(torch, dtype)).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _score(model: Any, rows: Sequence[TrainRow]) -> Iterator[TrainRow]:
    """Yield the rows with their log-probabilities, or with what stood against it."""
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    for row in rows:
        if _longest(row) > limit:
            yield replace(row, error=f"{_longest(row)} tokens are more than the model's {limit}")
    for row in _forward(model, [row for row in rows if _longest(row) <= limit]):
        sums = row.ref_chosen_logps, row.ref_rejected_logps
        if row.error is None and not all(map(math.isfinite, sums)):
            row = replace(row, error=f"log-probabilities {sums[0]} and {sums[1]}")
        yield row


def _forward(model: Any, rows: Sequence[TrainRow]) -> Iterator[TrainRow]:
    """Yield the rows as the model scores them; a batch that does not fit into memory is halved."""
    import torch

    from aipo_hpc.logps import collate, response_logps

    if not rows:
        return
    try:
        with torch.inference_mode():
            batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
            logps = response_logps(model, batch)
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            yield replace(rows[0], error=f"{_longest(rows[0])} tokens do not fit into memory: {error}")
            return
        logps = None
    if logps is None:
        torch.cuda.empty_cache()
        yield from _forward(model, rows[: len(rows) // 2])
        yield from _forward(model, rows[len(rows) // 2 :])
        return
    sums = (logps.chosen, logps.rejected, logps.chosen_shared, logps.rejected_shared)
    for row, *values in zip(rows, *(each.tolist() for each in sums), strict=True):
        yield replace(row, **dict(zip(LOGPS, values, strict=True)))


def _longest(row: TrainRow) -> int:
    return len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))


def _num_tokens(row: TrainRow) -> int:
    """Tokens that went through the model."""
    return 2 * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids)
