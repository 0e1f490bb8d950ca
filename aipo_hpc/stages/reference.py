"""Score pairs under the reference model: rows.Pair -> rows.TrainRow.

Chosen and rejected responses become token ids here, once, and their summed log-probabilities under the reference are
stored beside the ids, so that training needs no second model and trains on exactly what was scored.

    in    pairs       pairs.parquet, all pairs; shard s of S takes pairs [s*N//S, (s+1)*N//S)
          reference   the model that training holds on to: the iteration's own policy, or another of the same tokens
          policy      the model that is trained next; its tokenizer makes the ids
    out   rows.parquet     one TrainRow per pair that could be scored, in the order of the pairs
          errors.jsonl     {"prompt_id", "error"} of each pair that could not
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aipo_hpc import leaving
from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.progress import Progress
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Pair, TrainRow, read_rows
from aipo_hpc.settings import memory_bound, tuning
from aipo_hpc.suspects import Suspects
from aipo_hpc.task import Outcome, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ERRORS = "errors.jsonl"
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
    """Tokenise and score this shard's pairs. Pairs that cannot be scored are recorded and left out.

    Raises DataError if the model cannot be loaded, or if not one pair of a shard that has some could be scored.
    """
    pairs = _slice(list(read_rows(task.inputs["pairs"].named("pairs.parquet"), Pair)), task)
    errors: dict[str, str] = {}
    suspects = Suspects(task)
    with Progress(task, TrainRow) as progress:
        if pairs:
            _score_all(config, task, pairs, progress, errors, suspects)
        kept = [pair.prompt_id for pair in pairs if pair.prompt_id in progress]
        if pairs and not kept:
            raise DataError(
                f"{task.job}: none of the {len(pairs)} pairs of shard {task.shard} could be scored; the first failed "
                f"with: {next(iter(errors.values()))}"
            )
        outputs = progress.finish(kept)
        tokens = sum(_num_tokens(row) for row in progress.rows(kept))
    if errors:
        _write_errors(task.out / ERRORS, errors)
        outputs = (*outputs, ERRORS)
    return Outcome(len(kept), outputs, {"pairs": len(kept), "tokens": tokens, "errors": len(errors), **suspects.counts})


def _slice(pairs: list[Pair], task: Task) -> list[Pair]:
    """This shard's contiguous part. Raises DataError if a prompt has two pairs: rows are kept by prompt."""
    if len({pair.prompt_id for pair in pairs}) != len(pairs):
        raise DataError(f"{task.job}: some prompt_id has more than one pair; keep one pair per prompt_id.")
    return pairs[task.shard * len(pairs) // task.num_shards : (task.shard + 1) * len(pairs) // task.num_shards]


def _score_all(
    config: ReferenceConfig,
    task: Task,
    pairs: Sequence[Pair],
    progress: Progress[TrainRow],
    errors: dict[str, str],
    suspects: Suspects,
) -> None:
    """Append a row to ``progress``, or an entry to ``errors``, for each pair."""
    from aipo_hpc.chat import load_tokenizer, refuse_other_tokens

    model_name, policy = task.inputs["reference"].model, task.inputs["policy"].model
    if model_name != policy:
        refuse_other_tokens(policy, model_name)
    tokenizer = load_tokenizer(policy)
    unscored = []
    for pair in pairs:
        row = _tokenise(tokenizer, pair)
        if isinstance(row, TrainRow):
            unscored.append(row)
        else:
            errors[pair.prompt_id] = row
    # Batches are made of all pairs, finished ones too: what a pair is padded with must not depend on interruptions.
    named = {row.prompt_id: row for row in unscored}
    batches = [[row.prompt_id for row in batch] for batch in _batches(unscored, config.tokens_per_batch)]
    errors.update((prompt_id, suspects.reason) for prompt_id in suspects.guilty if prompt_id in named)
    rounds = suspects.rounds(batches, progress)
    if not rounds:
        return
    model = _load(model_name, config.dtype)
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    for batch in ([named[each] for each in batch] for batches in rounds for batch in batches):
        leaving.here("reference")
        suspects.begin([row.prompt_id for row in batch])
        fitting = []
        for row in batch:
            length = _longest(row)
            if length <= limit:
                fitting.append(row)
            else:
                errors[row.prompt_id] = f"{length} tokens are more than the model's {limit}"
        for row in _score(model, fitting, errors):
            if not (math.isfinite(row.ref_chosen_logps) and math.isfinite(row.ref_rejected_logps)):
                errors[row.prompt_id] = f"log-probabilities {row.ref_chosen_logps} and {row.ref_rejected_logps}"
            elif row.prompt_id not in progress:
                progress.append(row)
        suspects.end([row.prompt_id for row in batch if row.prompt_id not in progress])


def _tokenise(tokenizer: "PreTrainedTokenizerBase", pair: Pair) -> TrainRow | str:
    """The pair as token ids, log-probabilities still to come; or what is wrong with it."""
    from jinja2 import TemplateError

    from aipo_hpc.chat import prompt_ids, response_ids

    try:
        prompt = prompt_ids(tokenizer, pair.messages)
        chosen, rejected = (
            response_ids(tokenizer, candidate.response, candidate.finish_reason)
            for candidate in (pair.chosen, pair.rejected)
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        return f"cannot be tokenised: {type(error).__name__}: {error}"
    for name, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not ids:
            return f"{name} has no tokens"
    return TrainRow(pair.prompt_id, prompt, chosen, rejected, *[math.nan] * 4)


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


def _score(model: Any, rows: Sequence[TrainRow], errors: dict[str, str]) -> Iterator[TrainRow]:
    """Yield the rows with their log-probabilities; a batch that does not fit into memory is halved."""
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
            errors[rows[0].prompt_id] = f"{_longest(rows[0])} tokens do not fit into memory: {error}"
            return
        logps = None
    if logps is None:
        torch.cuda.empty_cache()
        yield from _score(model, rows[: len(rows) // 2], errors)
        yield from _score(model, rows[len(rows) // 2 :], errors)
        return
    sums = (logps.chosen, logps.rejected, logps.chosen_shared, logps.rejected_shared)
    for row, *values in zip(rows, *(each.tolist() for each in sums), strict=True):
        yield replace(row, **dict(zip(LOGPS, values, strict=True)))


def _longest(row: TrainRow) -> int:
    return len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))


def _num_tokens(row: TrainRow) -> int:
    """Tokens that went through the model."""
    return 2 * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids)


def _write_errors(path: Path, errors: dict[str, str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for prompt_id, error in errors.items():
            file.write(json.dumps({"prompt_id": prompt_id, "error": error}, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
