"""pairs: Ranked -> Pair. Best against worst candidate of each prompt, with filters; every dropped prompt keeps its reason.

Files: ``pairs.parquet`` (Pair rows), ``dropped.parquet`` (prompt id and reason), ``statistics.json``.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from aipo_hpc.errors import DataError
from aipo_hpc.resources import Resources
from aipo_hpc.rows import PROMPT_TOO_LONG, Candidate, Pair, Ranked, read_rows, write_rows
from aipo_hpc.settings import tuning
from aipo_hpc.task import Outcome, Task

PAIRS = "pairs.parquet"
DROPPED = "dropped.parquet"
STATISTICS = "statistics.json"

_URL = re.compile(r"https?://|www\.\w", re.IGNORECASE)


@dataclass(frozen=True)
class PairsConfig:
    """Which pairs are kept."""

    selection: str = "best_worst"
    """How the pair is chosen from the ranking: best_worst."""
    max_prompt_tokens: int = 512
    """Longest prompt in tokens, chat template included."""
    max_response_tokens: int = 2016
    """Longest response in tokens (the paper: max_length - max_prompt_length - 32 = 2560 - 512 - 32)."""
    drop_url_in_chosen: bool = True
    """Drop pairs whose chosen response has a URL."""
    drop_url_in_rejected: bool = False
    """Drop pairs whose rejected response has a URL."""
    resources: Resources = tuning(Resources(cpus_per_task=2, time=60))


@dataclass(frozen=True)
class Dropped:
    """A prompt that gave no pair."""

    prompt_id: str
    reason: str


def run(config: PairsConfig, task: Task) -> Outcome:
    """Choose and filter. Raises DataError when no pair is left, with the count of each reason."""
    from aipo_hpc.chat import load_tokenizer, prompt_ids

    tokenizer = load_tokenizer(task.inputs["policy"].model)
    pairs: list[Pair] = []
    dropped: list[Dropped] = []
    for row in read_rows(task.inputs["ranked"].files, Ranked):
        found = choose(row)
        reason = found if isinstance(found, str) else unfit(found, config)
        if reason is None and not isinstance(found, str):
            if len(prompt_ids(tokenizer, found.messages)) > config.max_prompt_tokens:
                reason = "prompt_too_long"
            else:
                pairs.append(found)
        if reason is not None:
            dropped.append(Dropped(row.prompt_id, reason))
    reasons = dict(sorted(Counter(drop.reason for drop in dropped).items()))
    if not pairs:
        raise DataError(
            f"{task.job}: no pair is left of {len(dropped)} prompts; dropped: {reasons}. Loosen the filters (pairs.*), "
            "sample more candidates or at a higher temperature (generate.n, generate.temperature)."
        )
    statistics = describe(pairs, reasons)
    write_rows(task.out / PAIRS, pairs, Pair)
    write_rows(task.out / DROPPED, dropped, Dropped)
    (task.out / STATISTICS).write_text(json.dumps(statistics, indent=1) + "\n")
    counts = {"kept": len(pairs), **{f"dropped_{reason}": number for reason, number in reasons.items()}}
    return Outcome(len(pairs), (PAIRS, DROPPED, STATISTICS), counts)


def choose(row: Ranked) -> Pair | str:
    """Best against worst candidate (the first of equals), or the reason why there is no pair."""
    if row.error is not None and row.error.startswith(PROMPT_TOO_LONG):
        return "prompt_too_long"
    if row.error is not None:
        return "not_ranked" if row.candidates else "not_generated"
    if len(row.candidates) < 2:
        return "single_candidate"
    positions = range(len(row.candidates))
    best = min(positions, key=lambda position: (row.ranks[position], position))
    worst = max(positions, key=lambda position: (row.ranks[position], -position))
    if row.ranks[best] == row.ranks[worst]:
        return "tie"
    chosen, rejected = row.candidates[best], row.candidates[worst]
    if chosen.response.strip() == rejected.response.strip():
        return "identical"
    return Pair(row.prompt_id, row.prompt, row.messages, chosen, rejected, row.scores[best], row.scores[worst])


def unfit(pair: Pair, config: PairsConfig) -> str | None:
    """The reason to drop a pair by its texts and response lengths, or None."""
    if not pair.chosen.response.strip():
        return "empty_chosen"
    if max(pair.chosen.num_tokens, pair.rejected.num_tokens) > config.max_response_tokens:
        return "response_too_long"
    if config.drop_url_in_chosen and _URL.search(pair.chosen.response):
        return "url_in_chosen"
    if config.drop_url_in_rejected and _URL.search(pair.rejected.response):
        return "url_in_rejected"
    return None


def describe(pairs: Sequence[Pair], reasons: dict[str, int]) -> dict[str, object]:
    """Statistics of the kept pairs: lengths in tokens and characters, score margin, cut-off responses."""

    def side(candidates: Sequence[Candidate]) -> dict[str, float]:
        return {
            "mean_tokens": round(fmean(candidate.num_tokens for candidate in candidates), 2),
            "mean_characters": round(fmean(len(candidate.response) for candidate in candidates), 2),
            "truncated": sum(candidate.finish_reason == "length" for candidate in candidates),
        }

    return {
        "kept": len(pairs),
        "dropped": reasons,
        "chosen": side([pair.chosen for pair in pairs]),
        "rejected": side([pair.rejected for pair in pairs]),
        "mean_margin": fmean(pair.chosen_score - pair.rejected_score for pair in pairs),
        "chosen_longer": fmean(pair.chosen.num_tokens > pair.rejected.num_tokens for pair in pairs),
    }
