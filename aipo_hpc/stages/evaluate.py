"""evaluate: Responses of the new policy and of the initial policy to held-out prompts -> Verdict, and metrics.

Each prompt's two answers are ranked against each other by the recipe's ranker, as the rank stage does it: a few prompts at a
time, kept as they are done. A tie counts half. The standard error of the win rate is that of a mean over prompts. Beside it
stands the win rate at equal lengths (``length_control.py``).
Files: ``verdicts.parquet``, ``metrics.json``.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean, stdev
from typing import Any

from aipo_hpc.benchmarks import BenchmarkConfig
from aipo_hpc.errors import DataError
from aipo_hpc.length_control import length_controlled
from aipo_hpc.progress import Progress
from aipo_hpc.rankers.config import RankerConfig
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Ranked, Responses, Verdict, read_rows, write_rows
from aipo_hpc.settings import memory_bound, tuning
from aipo_hpc.stages.rank import rank_all
from aipo_hpc.suspects import Suspects
from aipo_hpc.task import Outcome, Task

VERDICTS = "verdicts.parquet"
METRICS = "metrics.json"


@dataclass(frozen=True)
class EvaluateConfig(RankerConfig):
    """How a policy's answers to the held-out prompts are sampled and judged."""

    ranker: str = ""
    """The ranker that judges (empty: the recipe's, with all of its settings but the model if one is given here)."""
    model_name_or_path: str = ""
    """The ranker's model (empty: the recipe's rank.model_name_or_path; 'policy': the initial policy)."""

    temperature: float = 0.7
    """Sampling temperature of the answers (0: greedy)."""
    num_shards: int = 1
    """Shards of the array that samples the answers."""
    tokens_per_batch: int | None = memory_bound(16384)
    """Tokens the ranker reads at once."""
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    """Benchmarks that each policy answers, for their own tools to judge (set in a recipe file)."""
    resources: Resources = tuning(Resources(gpus_per_node=1, cpus_per_task=4, time=120))


def judging(config: EvaluateConfig, ranking: RankerConfig) -> EvaluateConfig:
    """The settings with the recipe's own ranker in them where they name none."""
    model = config if config.model_name_or_path else ranking
    taken: dict[str, Any] = {
        name: getattr(model, name) for name in ("model_name_or_path", "revision", "trust_remote_code")
    }
    if not config.ranker:
        theirs = {field.name: getattr(ranking, field.name) for field in fields(RankerConfig)}
        taken = {**theirs, "tokens_per_batch": config.tokens_per_batch, **taken}
    return replace(config, **taken)


def run(config: EvaluateConfig, task: Task) -> Outcome:
    """Judge the inputs ``answers`` against the inputs ``baseline``."""
    baseline = {row.prompt_id: row for row in read_rows(task.inputs["baseline"].files, Responses)}
    answers = list(read_rows(task.inputs["answers"].files, Responses))
    both = [row for row in answers if row.candidates and baseline[row.prompt_id].candidates]
    if not both:
        errors = sorted({row.error for row in (*answers, *baseline.values()) if row.error})[:3]
        raise DataError(f"{task.job}: no held-out prompt was answered by both policies; first errors: {errors}")
    asked = [replace(row, candidates=[row.candidates[0], baseline[row.prompt_id].candidates[0]]) for row in both]
    suspects = Suspects(task)
    with Progress(task, Ranked) as progress:
        rank_all(config, task, asked, progress, suspects)
        ranked = list(progress.rows(row.prompt_id for row in asked))
    verdicts = [
        judge(row, row.candidates[0].response, row.candidates[1].response, row.scores)
        for row in ranked
        if row.error is None
    ]
    if not verdicts:
        raise DataError(f"{task.job}: the ranker could not compare a single pair of answers: {ranked[0].error}")
    metrics = summarize(verdicts)
    counts = {**metrics, "not_judged": len(answers) - len(verdicts), **suspects.counts}
    write_rows(task.out / VERDICTS, verdicts, Verdict)
    (task.out / METRICS).write_text(json.dumps(counts, indent=1) + "\n")
    return Outcome(len(verdicts), (VERDICTS, METRICS), counts)


def judge(row: Ranked, mine: str, theirs: str, scores: Sequence[float]) -> Verdict:
    """Turn two scores (new policy, initial policy) into a verdict."""
    margin = scores[0] - scores[1]
    win = 0.5 if mine == theirs or margin == 0 else float(margin > 0)
    return Verdict(row.prompt_id, row.prompt, mine, theirs, margin, win, len(mine), len(theirs))


def summarize(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Win rates, plain and length-controlled, with their standard errors; what they are made of; mean lengths in characters.

    What the verdicts do not determine is left out: an error with one verdict, a length control without wins or losses.
    """
    wins = [verdict.win for verdict in verdicts]
    error = {"win_rate_se": stdev(wins) / math.sqrt(len(wins))} if len(wins) > 1 else {}
    fit = length_controlled(wins, [verdict.length - verdict.baseline_length for verdict in verdicts])
    controlled = (
        {
            "length_controlled_win_rate": fit.win_rate,
            "length_controlled_win_rate_se": fit.standard_error,
            "length_slope": fit.slope,
        }
        if fit
        else {}
    )
    return {
        "win_rate": fmean(wins),
        **error,
        **controlled,
        "wins": wins.count(1.0),
        "ties": wins.count(0.5),
        "losses": wins.count(0.0),
        "mean_length": fmean(verdict.length for verdict in verdicts),
        "baseline_mean_length": fmean(verdict.baseline_length for verdict in verdicts),
    }
