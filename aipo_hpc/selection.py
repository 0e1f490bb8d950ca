"""Which two of a prompt's candidates become a pair: Ranked -> Pair, or the reason why there is none.

best_worst    the best against the worst
best_random   the best against one drawn from those that are worse
max_second    the best against the best of those that are worse

Who is better is told by the ranker's scores after the length rule, which are also the scores that the pair carries:

none          the score
penalized     score - length_penalty x tokens
normalized    (score - the prompt's lowest score) / tokens: points earned per token

Of candidates that are equally good the first is taken; where all are, there is no pair.
"""

from collections.abc import Sequence

from aipo_hpc.rows import PROMPT_TOO_LONG, PROMPT_TOO_SHORT, Candidate, Pair, Ranked
from aipo_hpc.seeds import derived_seed

SELECTIONS = ("best_worst", "best_random", "max_second")
LENGTH_RULES = ("none", "penalized", "normalized")


def choose(
    row: Ranked,
    selection: str = "best_worst",
    length_rule: str = "none",
    length_penalty: float = 0.0,
    seed: int | str = 0,
) -> Pair | str:
    """The pair of a prompt, or why it has none."""
    if row.error is not None and row.error.startswith(PROMPT_TOO_LONG):
        return "prompt_too_long"
    if row.error is not None and row.error.startswith(PROMPT_TOO_SHORT):
        return "prompt_too_short"
    if row.error is not None:
        return "not_ranked" if row.candidates else "not_generated"
    if len(row.candidates) < 2:
        return "single_candidate"
    values = adjusted(row.scores, row.candidates, length_rule, length_penalty)
    best = values.index(max(values))
    worse = [position for position, value in enumerate(values) if value < values[best]]
    if not worse:
        return "tie"
    if selection == "best_random":
        rejected = worse[derived_seed(seed, row.prompt_id) % len(worse)]
    else:
        wanted = (min if selection == "best_worst" else max)(values[position] for position in worse)
        rejected = next(position for position in worse if values[position] == wanted)
    chosen = row.candidates[best]
    if chosen.response.strip() == row.candidates[rejected].response.strip():
        return "identical"
    return Pair(
        row.prompt_id, row.prompt, row.messages, chosen, row.candidates[rejected], values[best], values[rejected]
    )


def adjusted(
    scores: Sequence[float], candidates: Sequence[Candidate], length_rule: str, length_penalty: float
) -> list[float]:
    """The scores after the length rule."""
    if length_rule == "penalized":
        return [
            score - length_penalty * candidate.num_tokens for score, candidate in zip(scores, candidates, strict=True)
        ]
    if length_rule == "normalized":
        lowest = min(scores)
        return [
            (score - lowest) / max(1, candidate.num_tokens) for score, candidate in zip(scores, candidates, strict=True)
        ]
    return list(scores)
