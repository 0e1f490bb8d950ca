"""pairs: Ranked -> Pair. Two candidates of each prompt, with filters; every dropped prompt keeps its reason.

in    ranked             all prompts of the iteration
      policy             whose tokenizer measures prompts
      kept_out           benchmarks' prompts to keep out, if there are any
      earlier.K          own.parquet of the iteration K before this one
      mixed.I            ranked answers of a preference dataset
out   pairs.parquet      what is trained on: the iteration's own pairs, then parts of earlier ones, then of datasets
      own.parquet        the iteration's own pairs among them
      unfiltered.parquet the own pairs, before the filters
      dropped.parquet    prompt id, source, reason and detail of what gave no pair
      statistics.json    what these pairs are like, by source too, and the guard's values
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import tyro

from aipo_hpc import guard
from aipo_hpc.decontamination import Benchmarks
from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.filters import Filters, smallest_margins, unfit
from aipo_hpc.guard import GuardConfig
from aipo_hpc.mixing import KEEPS, renamed, take
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Candidate, KeptOut, Pair, Ranked, read_rows, write_rows
from aipo_hpc.selection import LENGTH_RULES, SELECTIONS, choose
from aipo_hpc.settings import tuning
from aipo_hpc.stages.preferences import PreferencesConfig
from aipo_hpc.task import Outcome, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS = "pairs.parquet"
OWN_PAIRS = "own.parquet"
UNFILTERED = "unfiltered.parquet"
DROPPED = "dropped.parquet"
STATISTICS = "statistics.json"
OWN = "own"
KEPT_OUT, EARLIER, MIXED = "kept_out", "earlier.", "mixed."
"""Names of inputs, the latter two followed by a number."""
_NAME = re.compile(r"(?!own$|iter-)[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class MixConfig(PreferencesConfig):
    """A preference dataset that is mixed in, and how much of it."""

    name: str = ""
    """What its pairs are called in statistics and ids."""
    ratio: float = 1.0
    """Share of the dataset that is taken."""
    keep: str = "random"
    """Which part that is: random (another one each iteration), keep_start, keep_end."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise RecipeError(f"pairs.mix: ratio={self.ratio}: must be above 0 and at most 1.")
        if self.keep not in KEEPS:
            raise RecipeError(f"pairs.mix: keep={self.keep!r}: {_one_of(KEEPS)}.")

    def reading(self) -> PreferencesConfig:
        """How it is read; how much of it is taken is told later."""
        read = {field.name: getattr(self, field.name) for field in fields(PreferencesConfig)}
        return PreferencesConfig(**{**read, "in_order": True})


@dataclass(frozen=True)
class PairsConfig(Filters):
    """Which pairs are made and kept."""

    selection: str = "best_worst"
    """How the pair is chosen from the ranking: best_worst, best_random, max_second (best against next best)."""
    length_rule: str = "none"
    """What is made of a score before candidates are compared: none, penalized (by length), normalized (per token)."""
    length_penalty: float = 0.0
    """Points of the ranker's score that a token costs (length_rule=penalized)."""
    decontaminate: str = ""
    """Lists of benchmark prompts, as in 'arena.jsonl + mt_bench.jsonl': prompts that hold one of them give no pair."""
    decontaminate_ngram: int = 8
    """Words in a row that a prompt and a benchmark's prompt must share to be compared."""
    decontaminate_overlap: float = 0.5
    """Share of a benchmark prompt's words, in such rows, from which on a prompt holds it."""
    accumulate: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """Shares of the own pairs of the iteration before, of that before it, ... that are trained on again."""
    mix: tuple[MixConfig, ...] = ()
    """Preference datasets of which a part is put beside every iteration's own pairs."""
    guard: Annotated[GuardConfig, tyro.conf.Suppress] = tuning(GuardConfig())
    """Thresholds: the recipe's own, guard.*"""
    resources: Resources = tuning(Resources(cpus_per_task=2, time=60))

    def __post_init__(self) -> None:
        names = [dataset.name for dataset in self.mix]
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
                ("decontaminate_ngram", self.decontaminate_ngram, self.decontaminate_ngram > 0, "must be 1 or more"),
                (
                    "decontaminate_overlap",
                    self.decontaminate_overlap,
                    0 < self.decontaminate_overlap <= 1,
                    "must be above 0 and at most 1",
                ),
                (
                    "mix",
                    names,
                    len(set(names)) == len(names) and all(map(_NAME.fullmatch, names)),
                    "each dataset needs a name of its own, of letters, digits, '.', '_' and '-', not own or iter-*",
                ),
                (
                    "accumulate",
                    self.accumulate,
                    all(0 < ratio <= 1 for ratio in self.accumulate),
                    "each share must be above 0 and at most 1",
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
    """A prompt that gave no pair, or a pair from elsewhere that was not taken over."""

    prompt_id: str
    reason: str
    source: str = OWN
    detail: str = ""


Fit = Callable[[Pair, Filters], Dropped | None]


def as_known_to_its_job(config: PairsConfig, iteration: int, thresholds: GuardConfig) -> PairsConfig:
    """The settings that decide this iteration's pairs: what is read is an input, known by what it holds."""
    mix = tuple(MixConfig(name=each.name, ratio=each.ratio, keep=each.keep) for each in config.mix)
    return replace(config, decontaminate="", accumulate=config.accumulate[:iteration], mix=mix, guard=thresholds)


def run(config: PairsConfig, task: Task) -> Outcome:
    """Choose, filter and mix. Raises DataError when no pair is left, with the count of each reason; GuardStop."""
    from aipo_hpc.chat import load_tokenizer

    fit = fitting(config, task, load_tokenizer(task.inputs["policy"].model))
    tally = guard.Tally()
    chosen: list[Pair] = []
    own: list[Pair] = []
    dropped: list[Dropped] = []
    seed = f"{task.seed}/{task.iteration}"
    for row in read_rows(task.inputs["ranked"].files, Ranked):
        tally.add(row)
        found = choose(row, config.selection, config.length_rule, config.length_penalty, seed)
        if isinstance(found, str):
            dropped.append(Dropped(row.prompt_id, found))
            continue
        chosen.append(found)
        if (reason := fit(found, config)) is None:
            own.append(found)
        else:
            dropped.append(reason)
    smallest = smallest_margins(own, config.min_margin_quantile)
    dropped += [Dropped(own[position].prompt_id, "margin_quantile") for position in sorted(smallest)]
    own = [pair for position, pair in enumerate(own) if position not in smallest]
    reasons = _counted(dropped)
    if not own:
        raise DataError(
            f"{task.job}: no pair is left of {len(dropped)} prompts; dropped: {reasons}. Loosen the filters (pairs.*), "
            "sample more candidates or at a higher temperature (generate.n, generate.temperature)."
        )
    values = tally.values(own, reasons.get("tie", 0))
    findings = guard.check(values, config.guard)
    for finding in findings:
        print(f"guard: {finding}", flush=True)
    guard.enforce(findings, task.job)
    pairs = list(own)
    for each in elsewhere(config, task, fit):
        if isinstance(each, Pair):
            pairs.append(each)
        else:
            dropped.append(each)
    write_rows(task.out / PAIRS, pairs, Pair)
    write_rows(task.out / OWN_PAIRS, own, Pair)
    write_rows(task.out / UNFILTERED, chosen, Pair)
    write_rows(task.out / DROPPED, dropped, Dropped)
    statistics = {**describe(pairs, _counted(dropped)), "sources": by_source(pairs, dropped), "guard": values}
    (task.out / STATISTICS).write_text(json.dumps(statistics, indent=1) + "\n")
    counts = {
        "kept": len(own),
        "added": len(pairs) - len(own),
        **{f"dropped_{reason}": number for reason, number in reasons.items()},
        **{f"{guard.VALUE}{name}": value for name, value in values.items()},
    }
    return Outcome(len(pairs), (PAIRS, OWN_PAIRS, UNFILTERED, DROPPED, STATISTICS), counts)


def fitting(config: PairsConfig, task: Task, tokenizer: "PreTrainedTokenizerBase") -> Fit:
    """What tells of a pair why it is dropped, if it is."""
    from aipo_hpc.chat import prompt_ids

    listed = task.inputs[KEPT_OUT].files if KEPT_OUT in task.inputs else ()
    texts = {row.source: row.text for row in read_rows(listed, KeptOut)}
    benchmarks = Benchmarks(texts, config.decontaminate_ngram, config.decontaminate_overlap)

    def fit(pair: Pair, filters: Filters) -> Dropped | None:
        reason, detail = unfit(pair, filters), ""
        if reason is None and len(prompt_ids(tokenizer, pair.messages)) > filters.max_prompt_tokens:
            reason = "prompt_too_long"
        for turn in pair.messages:
            if reason is None and turn.role == "user" and (match := benchmarks.match(turn.content)):
                reason, detail = "contaminated", f"{match.source}, {match.overlap:.2f} of it"
        return None if reason is None else Dropped(pair.prompt_id, reason, pair.source, detail)

    return fit


def elsewhere(config: PairsConfig, task: Task, fit: Fit) -> Iterator[Pair | Dropped]:
    """Pairs of earlier iterations and of datasets, or why one is not taken over.

    The former were filtered when they were made. Scores of the latter are of another kind: neither a smallest margin nor the
    length rule applies to them.
    """
    seed = f"{task.seed}/{task.iteration}"
    for back, ratio in enumerate(config.accumulate, 1):
        if (files := task.inputs.get(f"{EARLIER}{back}")) is not None:
            source = f"iter-{task.iteration - back:02d}"
            for pair in take(list(read_rows(files.files, Pair)), ratio, "random", f"{seed}/{source}"):
                yield renamed(pair, source)
    unscored = replace(config, min_margin=0.0)
    for number, dataset in enumerate(config.mix):
        rows = list(read_rows(task.inputs[f"{MIXED}{number}"].files, Ranked))
        for row in take(rows, dataset.ratio, dataset.keep, f"{seed}/{dataset.name}"):
            found = choose(row, config.selection, seed=seed)
            if isinstance(found, str):
                yield Dropped(f"{row.prompt_id}@{dataset.name}", found, dataset.name)
            else:
                pair = renamed(found, dataset.name)
                yield fit(pair, unscored) or pair


def _counted(dropped: Sequence[Dropped]) -> dict[str, int]:
    return dict(sorted(Counter(drop.reason for drop in dropped).items()))


def by_source(pairs: Sequence[Pair], dropped: Sequence[Dropped]) -> dict[str, object]:
    """The statistics of the pairs of each source."""
    sources = dict.fromkeys([*(pair.source for pair in pairs), *(drop.source for drop in dropped)])
    return {
        source: describe(
            [pair for pair in pairs if pair.source == source],
            _counted([drop for drop in dropped if drop.source == source]),
        )
        for source in sources
    }


def describe(pairs: Sequence[Pair], reasons: dict[str, int]) -> dict[str, object]:
    """Statistics of kept pairs: lengths in tokens and characters, score margin, cut-off responses."""
    if not pairs:
        return {"kept": 0, "dropped": reasons}

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
