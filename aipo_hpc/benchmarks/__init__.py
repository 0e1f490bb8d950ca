"""Benchmarks whose answers are judged elsewhere, by their own tools. One file each; this is what they have in common.

A benchmark's file knows three things: how a row of its questions is asked (``question``), how answers are sampled
(``SAMPLING``), and where and in which form its tool reads a model's answers (``answer_file``, ``render``). The questions are
the user's: a .jsonl file, or a .json file with a list, in the form in which the benchmark publishes them.
"""

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, cast

from aipo_hpc.errors import DataError, RecipeError

BENCHMARKS: Mapping[str, str] = {
    "alpaca_eval": "aipo_hpc.benchmarks.alpaca_eval",
    "mt_bench": "aipo_hpc.benchmarks.mt_bench",
    "arena_hard": "aipo_hpc.benchmarks.arena_hard",
}
"""The module of each benchmark."""

FAILED = "ERROR"
"""What stands for an answer that could not be given, as in FastChat's own generation."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """A benchmark that each policy answers; its own tool judges the answers later."""

    name: str
    """alpaca_eval, mt_bench or arena_hard."""
    questions: str
    """Path of the questions, as the benchmark publishes them."""
    num_shards: int = 1
    """Shards of the array that answers them."""
    max_tokens: int | None = None
    """Longest answer in tokens (None: as the benchmark has it)."""
    max_prompt_tokens: int | None = None
    """Longest conversation before an answer in tokens (None: as the benchmark needs)."""


@dataclass(frozen=True)
class Sampling:
    """How a benchmark's answers are sampled."""

    temperature: float
    max_tokens: int
    max_prompt_tokens: int
    top_p: float = 1.0
    top_k: int = 50


@dataclass(frozen=True)
class Question:
    """What is asked, turn by turn; ``temperature`` is the question's own, where it has one."""

    question_id: str
    turns: tuple[str, ...]
    row: Mapping[str, Any]
    """The question as it was published."""
    temperature: float | None = None


@dataclass(frozen=True)
class Answer:
    """A policy's answers to the turns of a question; ``num_tokens`` in its own tokens."""

    question: Question
    turns: tuple[str, ...]
    num_tokens: tuple[int, ...]

    def identifier(self, model: str) -> str:
        """A name for this model's answer to this question, of the length that the tools' own have."""
        text = json.dumps([model, self.question.question_id, self.turns])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:22]


class Benchmark(Protocol):
    """What the module of a benchmark has."""

    SAMPLING: Sampling

    def question(self, row: Mapping[str, Any]) -> Question:
        """What a row of the questions asks. Raises KeyError, TypeError or ValueError for one that is of another form."""
        ...

    def answer_file(self, model: str) -> str:
        """Where the tool looks for this model's answers, below the folder in which it keeps its data."""
        ...

    def render(self, answers: Sequence[Answer], model: str, now: float) -> str:
        """The text of that file."""
        ...


def load_benchmark(name: str) -> Benchmark:
    """The benchmark of that name; raises RecipeError if there is none."""
    if name not in BENCHMARKS:
        close = get_close_matches(name, BENCHMARKS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"evaluate.benchmarks names {name!r}, which is not known.{hint} There are {', '.join(BENCHMARKS)}."
        )
    return cast(Benchmark, importlib.import_module(BENCHMARKS[name]))


def check_benchmarks(configs: Sequence[BenchmarkConfig]) -> None:
    """Make sure that benchmarks are known, asked for once, and have sensible numbers; raises RecipeError."""
    names = [config.name for config in configs]
    for config in configs:
        load_benchmark(config.name)
        where = f"evaluate.benchmarks, {config.name}"
        if names.count(config.name) > 1:
            raise RecipeError(f"{where}: named twice; leave one out.")
        if not config.questions:
            raise RecipeError(f"{where}: questions is not set: give the path of its questions.")
        for name in ("num_shards", "max_tokens", "max_prompt_tokens"):
            value = getattr(config, name)
            if value is not None and value < 1:
                raise RecipeError(f"{where}: {name}={value} must be at least 1.")


def read_questions(name: str, path: Path) -> list[Question]:
    """The questions of a file. Raises DataError for one that is not the benchmark's."""
    benchmark = load_benchmark(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise DataError(
            f"questions of {name}, {path}: cannot be read ({error}). Give the path of its questions."
        ) from error
    found: list[Question] = []
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in _lines(text)]
        for row in rows:
            found.append(benchmark.question(row))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"questions of {name}, {path}, number {len(found) + 1}: not in the form that {name} publishes "
            f"({type(error).__name__}: {error}). Give its own file of questions."
        ) from error
    repeated = [identity for identity, number in Counter(each.question_id for each in found).items() if number > 1]
    if repeated or not found:
        wrong = f"{repeated[0]!r} is asked twice" if repeated else "there is none in it"
        raise DataError(f"questions of {name}, {path}: {wrong}. Give its own file of questions.")
    return found


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]
