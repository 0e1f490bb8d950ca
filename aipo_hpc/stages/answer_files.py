"""answer_files: Responses to benchmarks -> the files that the benchmarks' own tools read, a model's answers in each.

Per benchmark the inputs ``<name>`` (the rows) and ``<name>.questions``; with ``<name>.initial``, the initial policy's answers
are written as well. Files lie where the tools look for them below their data folders, so a folder can be copied as it is.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aipo_hpc.benchmarks import FAILED, Answer, Question, load_benchmark, read_questions
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Responses, read_rows
from aipo_hpc.settings import tuning
from aipo_hpc.stages.benchmark import row_id
from aipo_hpc.task import Outcome, Task

_INITIAL = ".initial"


@dataclass(frozen=True)
class AnswerFilesConfig:
    """What models are called in the files."""

    benchmarks: tuple[str, ...] = ()
    """The benchmarks."""
    model: str = ""
    """Name of the recipe, with which the names of its models begin."""
    resources: Resources = tuning(Resources(cpus_per_task=1, time=30))


def initial_model(recipe: str) -> str:
    """What the initial policy is called."""
    return f"{recipe}-initial"


def trained_model(recipe: str, iteration: int) -> str:
    """What the policy that an iteration trained is called."""
    return f"{recipe}-iter-{iteration:02d}"


def run(config: AnswerFilesConfig, task: Task) -> Outcome:
    """Write the files of each benchmark."""
    written: list[str] = []
    counts: dict[str, float] = {}
    now = time.time()
    for name in config.benchmarks:
        benchmark = load_benchmark(name)
        questions = read_questions(name, Path(str(task.inputs[f"{name}.questions"].value)))
        models = {name: trained_model(config.model, task.iteration)}
        if f"{name}{_INITIAL}" in task.inputs:
            models[f"{name}{_INITIAL}"] = initial_model(config.model)
        for source, model in models.items():
            rows = {row.prompt_id: row for row in read_rows(task.inputs[source].files, Responses)}
            answers = [_collect(question, rows) for question in questions]
            path = task.out / benchmark.answer_file(model)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(benchmark.render(answers, model, now), encoding="utf-8")
            written.append(path.relative_to(task.out).as_posix())
            given = [turn for answer in answers for turn in answer.turns if turn != FAILED]
            title = source.replace(_INITIAL, "_initial")
            counts |= {
                f"{title}_questions": len(answers),
                f"{title}_errors": sum(row.error is not None for row in rows.values()),
                f"{title}_mean_length": sum(map(len, given)) / max(1, len(given)),
            }
    return Outcome(len(written), tuple(written), counts)


def _collect(question: Question, rows: dict[str, Responses]) -> Answer:
    turns = list(_turns(question, rows))
    return Answer(question, tuple(text for text, _ in turns), tuple(tokens for _, tokens in turns))


def _turns(question: Question, rows: dict[str, Responses]) -> Iterator[tuple[str, int]]:
    for turn in range(len(question.turns)):
        row = rows[row_id(question, turn)]
        if row.candidates:
            text = row.candidates[0].response.encode("utf-8", "replace").decode()
            yield text, row.candidates[0].num_tokens
        else:
            yield FAILED, 0
