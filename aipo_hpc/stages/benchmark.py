"""benchmark: the questions of a benchmark -> Responses, a row per question and turn, with one answer by the policy.

A later turn is asked after the policy's own answers to the earlier ones. Questions are split into shards; the answers of a
shard's questions to one turn are sampled together, each at its question's temperature, with a seed of its own. Finished
answers are kept as they finish. A turn that cannot be answered has its error in the row, and so have those after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from aipo_hpc.benchmarks import BenchmarkConfig, Question, load_benchmark, read_questions
from aipo_hpc.engines import EngineConfig
from aipo_hpc.progress import Progress
from aipo_hpc.resources import Resources
from aipo_hpc.rows import PROMPT_TOO_LONG, Candidate, Message, Responses
from aipo_hpc.sampling import in_batches, sample
from aipo_hpc.seeds import derived_seed
from aipo_hpc.settings import tuning
from aipo_hpc.stages.generate import GenerateConfig, shard_of
from aipo_hpc.suspects import Suspects
from aipo_hpc.task import Outcome, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from aipo_hpc.engines import Engine, Request


@dataclass(frozen=True)
class AnswersConfig(EngineConfig):
    """How a policy answers a benchmark: with the recipe's engine, sampled as the benchmark does."""

    section: ClassVar[str] = "evaluate.benchmarks"
    name: str = ""
    """The benchmark."""
    system_message: str | None = None
    """System message put before every conversation."""
    resources: Resources = tuning(Resources(gpus_per_node=1, cpus_per_task=8))


def answering(benchmark: BenchmarkConfig, generate: GenerateConfig) -> AnswersConfig:
    """The settings of the jobs that answer a benchmark in a recipe that generates like this."""
    sampling = load_benchmark(benchmark.name).SAMPLING
    engine = {field.name: getattr(generate, field.name) for field in fields(EngineConfig)}
    sampled = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": benchmark.max_tokens or sampling.max_tokens,
        "max_prompt_tokens": benchmark.max_prompt_tokens or sampling.max_prompt_tokens,
    }
    kept = {"name": benchmark.name, "system_message": generate.system_message, "resources": generate.resources}
    return AnswersConfig(**{**engine, **sampled, **kept})


def row_id(question: Question, turn: int) -> str:
    """Name of the row with the answer to a turn."""
    return f"{question.question_id}/{turn}"


def run(config: AnswersConfig, task: Task) -> Outcome:
    """Answer this shard's questions with the input ``policy``."""
    questions = shard_of(read_questions(config.name, Path(str(task.inputs["questions"].value))), task)
    policy = task.inputs["policy"].model
    suspects = Suspects(task)
    tools: tuple[PreTrainedTokenizerBase, Callable[[], Engine]] | None = None
    with Progress(task, Responses) as progress:
        for turn in range(max((len(question.turns) for question in questions), default=0)):
            asked = {row_id(question, turn): question for question in questions if turn < len(question.turns)}
            if all(name in progress for name in asked):
                continue
            tools = tools or _tools(config, policy)
            begun = {name: conversation(question, turn, config, progress) for name, question in asked.items()}
            _answer(asked, begun, turn, config, task, progress, suspects, *tools)
        names = [row_id(question, turn) for question in questions for turn in range(len(question.turns))]
        outputs = progress.finish(names)
        rows = list(progress.rows(names))
    answers = [candidate for row in rows for candidate in row.candidates]
    counts = {
        "questions": len(questions),
        "errors": sum(row.error is not None for row in rows),
        "tokens": sum(answer.num_tokens for answer in answers),
        "characters": sum(len(answer.response) for answer in answers),
        "truncated": sum(answer.finish_reason == "length" for answer in answers),
        **suspects.counts,
        "taken_over": progress.num_taken_over,
    }
    return Outcome(len(rows), outputs, counts)


def conversation(
    question: Question, turn: int, config: AnswersConfig, progress: Progress[Responses]
) -> "list[Message] | str":
    """What comes before the answer to a turn, or the error of an earlier turn."""
    messages = [Message("system", config.system_message)] if config.system_message is not None else []
    for number, said in enumerate(question.turns[: turn + 1]):
        messages.append(Message("user", said))
        if number < turn:
            (before,) = progress.rows([row_id(question, number)])
            if before.error is not None:
                return f"turn {number + 1} has no answer: {before.error}"
            messages.append(Message("assistant", before.candidates[0].response))
    return messages


def _tools(config: AnswersConfig, policy: str) -> "tuple[PreTrainedTokenizerBase, Callable[[], Engine]]":
    """The tokenizer, and what gives the engine, which is loaded once and not before it is needed."""
    from aipo_hpc.chat import load_tokenizer
    from aipo_hpc.engines import load_engine

    return load_tokenizer(policy), cache(lambda: load_engine(config, policy))


def _answer(
    asked: dict[str, Question],
    begun: "dict[str, list[Message] | str]",
    turn: int,
    config: AnswersConfig,
    task: Task,
    progress: Progress[Responses],
    suspects: Suspects,
    tokenizer: "PreTrainedTokenizerBase",
    engine: "Callable[[], Engine]",
) -> None:
    """Have the rows of a turn in ``progress``. Raises Left if this process was asked to leave before that."""
    from aipo_hpc.engines import prompts_per_batch

    def keep(name: str, candidates: list[Candidate], error: str | None) -> None:
        if name not in progress:
            said = messages if isinstance(messages := begun[name], list) else []
            progress.append(Responses(name, asked[name].turns[turn], said, candidates, error))

    requests: dict[str, list[Request]] = {}
    for name, question in asked.items():
        request = _ask(name, question, begun[name], config, task, tokenizer)
        if isinstance(request, str):
            keep(name, [], request)
        else:
            requests[name] = [request]
    for name in suspects.guilty:
        if name in requests:
            keep(name, [], suspects.reason)
    size, where = prompts_per_batch(config), f"{task.job} shard {task.shard}"
    rounds = suspects.rounds(in_batches(list(requests), size), progress)
    for done in sample(rounds, size, requests, progress, suspects, engine, where):
        given = [] if done.error is not None else [Candidate(done.text.strip(), done.finish_reason, done.num_tokens)]
        keep(done.request.prompt_id, given, done.error)


def _ask(
    name: str,
    question: Question,
    messages: "Sequence[Message] | str",
    config: AnswersConfig,
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
) -> "Request | str":
    """The request for an answer, or why it cannot be given."""
    from jinja2 import TemplateError

    from aipo_hpc.chat import prompt_ids
    from aipo_hpc.engines import Request

    if isinstance(messages, str):
        return messages
    try:
        ids = prompt_ids(tokenizer, messages)
    except (TemplateError, UnicodeError, TypeError, ValueError) as error:
        return f"chat template: {error}"
    if len(ids) > config.max_prompt_tokens:
        return f"{PROMPT_TOO_LONG}: {len(ids)} tokens is longer than max_prompt_tokens={config.max_prompt_tokens}"
    seed = derived_seed(task.seed, task.iteration, config.name, name)
    return replace(Request(name, 0, tuple(ids), seed), temperature=question.temperature)
