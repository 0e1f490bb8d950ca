"""pairs: Ranked -> Pair. Two candidates of each prompt, with filters; every dropped prompt keeps its reason.

Files: ``pairs.parquet`` (what is trained on), ``unfiltered.parquet`` (all pairs, before the filters), ``dropped.parquet``
(prompt id and reason), ``statistics.json``.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.filters import Filters, smallest_margins, unfit
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Candidate, Pair, Ranked, read_rows, write_rows
from aipo_hpc.selection import LENGTH_RULES, SELECTIONS, choose
from aipo_hpc.settings import tuning
from aipo_hpc.task import Outcome, Task

PAIRS = "pairs.parquet"
UNFILTERED = "unfiltered.parquet"
DROPPED = "dropped.parquet"
STATISTICS = "statistics.json"


@dataclass(frozen=True)
class PairsConfig(Filters):
    """Which pairs are made and kept."""

    selection: str = "best_worst"
    """How the pair is chosen from the ranking: best_worst, best_random, max_second (best against next best)."""
    length_rule: str = "none"
    """What is made of a score before candidates are compared: none, penalized (by length), normalized (per token)."""
    length_penalty: float = 0.0
    """Points of the ranker's score that a token costs (length_rule=penalized)."""
    resources: Resources = tuning(Resources(cpus_per_task=2, time=60))

    def __post_init__(self) -> None:
        wrong = [
            f"pairs.{name}={value!r}: {what}"
            for name, value, valid, what in (
                (
                    "selection",
                    self.selection,
                    self.selection in SELECTIONS,
                    f"no such selection; {_one_of(SELECTIONS)}",
                ),
                (
                    "length_rule",
                    self.length_rule,
                    self.length_rule in LENGTH_RULES,
                    f"no such rule; {_one_of(LENGTH_RULES)}",
                ),
                ("max_similarity", self.max_similarity, 0 <= self.max_similarity <= 1, "must be from 0 to 1"),
                ("min_margin", self.min_margin, self.min_margin >= 0, "must be 0 or more"),
                (
                    "min_margin_quantile",
                    self.min_margin_quantile,
                    0 <= self.min_margin_quantile < 1,
                    "must be from 0 to below 1",
                ),
            )
            if not valid
        ]
        if wrong:
            raise RecipeError("; ".join(wrong))


def _one_of(names: Sequence[str]) -> str:
    return f"choose one of {', '.join(names)}"


@dataclass(frozen=True)
class Dropped:
    """A prompt that gave no pair."""

    prompt_id: str
    reason: str


def run(config: PairsConfig, task: Task) -> Outcome:
    """Choose and filter. Raises DataError when no pair is left, with the count of each reason."""
    from aipo_hpc.chat import load_tokenizer, prompt_ids

    tokenizer = load_tokenizer(task.inputs["policy"].model)
    chosen: list[Pair] = []
    pairs: list[Pair] = []
    dropped: list[Dropped] = []
    seed = f"{task.seed}/{task.iteration}"
    for row in read_rows(task.inputs["ranked"].files, Ranked):
        found = choose(row, config.selection, config.length_rule, config.length_penalty, seed)
        if isinstance(found, str):
            dropped.append(Dropped(row.prompt_id, found))
            continue
        chosen.append(found)
        reason = unfit(found, config)
        if reason is None and len(prompt_ids(tokenizer, found.messages)) > config.max_prompt_tokens:
            reason = "prompt_too_long"
        if reason is None:
            pairs.append(found)
        else:
            dropped.append(Dropped(row.prompt_id, reason))
    smallest = smallest_margins(pairs, config.min_margin_quantile)
    dropped += [Dropped(pairs[position].prompt_id, "margin_quantile") for position in sorted(smallest)]
    pairs = [pair for position, pair in enumerate(pairs) if position not in smallest]
    reasons = dict(sorted(Counter(drop.reason for drop in dropped).items()))
    if not pairs:
        raise DataError(
            f"{task.job}: no pair is left of {len(dropped)} prompts; dropped: {reasons}. Loosen the filters (pairs.*), "
            "sample more candidates or at a higher temperature (generate.n, generate.temperature)."
        )
    statistics = describe(pairs, reasons)
    write_rows(task.out / PAIRS, pairs, Pair)
    write_rows(task.out / UNFILTERED, chosen, Pair)
    write_rows(task.out / DROPPED, dropped, Dropped)
    (task.out / STATISTICS).write_text(json.dumps(statistics, indent=1) + "\n")
    counts = {"kept": len(pairs), **{f"dropped_{reason}": number for reason, number in reasons.items()}}
    return Outcome(len(pairs), (PAIRS, UNFILTERED, DROPPED, STATISTICS), counts)


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
