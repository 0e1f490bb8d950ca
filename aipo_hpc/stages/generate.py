"""generate: Prompt -> Responses. n candidates per prompt, sampled from the current policy, one shard per task.

Every candidate is one request with a seed of its own, derived from (run seed, iteration, prompt id, candidate): what is
sampled depends neither on the sharding nor on retries, as far as the engine's arithmetic is independent of the batch.
A prompt that the engine refuses is recorded with its error and skipped; finished prompts are kept as they finish.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, ClassVar, TypeVar

from aipo_hpc.blocks import Blocks
from aipo_hpc.engines import EngineConfig
from aipo_hpc.progress import Progress
from aipo_hpc.resources import Resources
from aipo_hpc.rows import PROMPT_TOO_LONG, PROMPT_TOO_SHORT, Candidate, Message, Prompt, Responses, read_rows
from aipo_hpc.sampling import in_batches, sample
from aipo_hpc.seeds import derived_seed
from aipo_hpc.settings import tuning
from aipo_hpc.suspects import Suspects
from aipo_hpc.task import Outcome, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from aipo_hpc.engines import Completion, Request

Item = TypeVar("Item")


@dataclass(frozen=True)
class GenerateConfig(EngineConfig):
    """How responses are sampled. Defaults of the sampling are the paper's (Shen et al. 2024, arXiv 2409.08845)."""

    section: ClassVar[str] = "generate"
    n: int = 5
    """Candidates per prompt."""
    num_prompts: int | None = None
    """Prompts per iteration, a different part of the source each time (None: all of them, every time)."""
    num_shards: int = 8
    """Shards of the array, each a task of its own."""
    temperature: float = 0.4
    """Sampling temperature (0: greedy)."""
    top_k: int = 50
    """Most likely tokens to draw from (0: all)."""
    max_tokens: int = 2048
    """Longest response in tokens."""
    max_prompt_tokens: int = 512
    """Longest prompt in tokens, chat template included; longer ones are recorded and skipped."""
    min_prompt_tokens: int = 3
    """Shortest prompt in tokens of its text alone; shorter ones are recorded and skipped."""
    greedy: bool = False
    """One more candidate, decoded greedily."""
    second_temperature: float | None = None
    """Temperature at which n more candidates are sampled (None: there are none)."""
    dataset_answer: bool = False
    """One more candidate: the prompt source's own answer, where it has one."""
    system_message: str | None = None
    """System message put before every conversation that has none; it may be empty (None: there is none)."""
    keep_system_message: bool = True
    """Keep system messages that the prompt source brings along; otherwise they are dropped first."""
    share_after: float | None = tuning(1.5)
    """The last running shards of a job are done together with extra tasks, where there is room for them, once they have run
    this many times as long as its finished shards did (median), and two minutes at least (None: never)."""
    resources: Resources = tuning(Resources(gpus_per_node=1, cpus_per_task=8))


def run(config: GenerateConfig, task: Task) -> Outcome:
    """Sample the candidates of this shard's prompts with the input ``policy``."""
    from aipo_hpc.chat import load_tokenizer
    from aipo_hpc.engines import load_engine, prompts_per_batch

    source = list(read_rows(task.inputs["prompts"].files, Prompt))
    prompts = [
        put(prompt, config.system_message, config.keep_system_message)
        for prompt in shard_of(select(source, config, task), task)
    ]
    policy = task.inputs["policy"].model
    suspects = Suspects(task)
    with Progress(task, Responses) as progress:
        waiting = [prompt for prompt in prompts if prompt.prompt_id not in progress]
        if waiting:
            tokenizer = load_tokenizer(policy)
            asked = {prompt.prompt_id: _ask(prompt, tokenizer, config, task) for prompt in prompts}
            requests = {prompt_id: made for prompt_id, made in asked.items() if not isinstance(made, str)}
            for prompt in waiting:
                error = suspects.reason if prompt.prompt_id in suspects.guilty else asked[prompt.prompt_id]
                if isinstance(error, str):
                    progress.append(Responses(prompt.prompt_id, prompt.prompt, prompt.messages, [], error))
            accepted = {prompt.prompt_id: prompt for prompt in prompts if prompt.prompt_id in requests}
            answers = {prompt_id: _answer(prompt, tokenizer, config) for prompt_id, prompt in accepted.items()}
            size = prompts_per_batch(config)
            done = sample(
                Blocks(task, in_batches(list(accepted), size), progress, suspects).rounds(),
                size,
                requests,
                progress,
                suspects,
                cache(lambda: load_engine(config, policy)),
                f"{task.job} shard {task.shard}",
            )
            for row in _collect(accepted, done, plan(config), answers):
                if row.prompt_id not in progress:
                    progress.append(row)
        outputs = progress.finish(prompt.prompt_id for prompt in prompts)
        counts = _counts(list(progress.rows(prompt.prompt_id for prompt in prompts)))
        counts |= {**suspects.counts, **progress.counts, "taken_over": progress.num_taken_over}
        return Outcome(len(prompts), outputs, counts)


def select(prompts: list[Prompt], config: GenerateConfig, task: Task) -> list[Prompt]:
    """The prompts of this iteration: the next ``num_prompts`` of the source, starting over at its end."""
    if config.num_prompts is None:
        return prompts
    size = min(config.num_prompts, len(prompts))
    start = task.iteration * size
    return [prompts[(start + position) % len(prompts)] for position in range(size)]


def shard_of(prompts: Sequence[Item], task: Task) -> Sequence[Item]:
    """This shard's contiguous part; parts differ by one prompt at most and together hold every prompt once."""
    start, end = (len(prompts) * edge // task.num_shards for edge in (task.shard, task.shard + 1))
    return prompts[start:end]


def sampling_seed(seed: int, iteration: int, prompt_id: str, candidate: int) -> int:
    """The seed of one candidate, below 2**31."""
    return derived_seed(seed, iteration, prompt_id, candidate)


def plan(config: GenerateConfig) -> list[tuple[str, float]]:
    """Source and temperature of each candidate that is asked of the engine, in their order."""
    greedy = [("greedy", 0.0)] if config.greedy else []
    second = [] if config.second_temperature is None else [("second_temperature", config.second_temperature)] * config.n
    return [*[("sampled", config.temperature)] * config.n, *greedy, *second]


def num_candidates(config: GenerateConfig) -> int:
    """Candidates of a prompt at most."""
    return len(plan(config)) + config.dataset_answer


def sampled_only(config: GenerateConfig) -> GenerateConfig:
    """The settings without extra candidates."""
    return replace(config, greedy=False, second_temperature=None, dataset_answer=False)


def put(prompt: Prompt, system_message: str | None, keep: bool = True) -> Prompt:
    """The prompt with the recipe's system message in front of its conversation, unless it brings its own that is kept."""
    if not keep and any(message.role == "system" for message in prompt.messages):
        prompt = replace(prompt, messages=[message for message in prompt.messages if message.role != "system"])
    if system_message is None or prompt.messages[0].role == "system":
        return prompt
    return replace(prompt, messages=[Message("system", system_message), *prompt.messages])


def _ask(
    prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", config: GenerateConfig, task: Task
) -> "list[Request] | str":
    """The requests for one prompt, or why it cannot be served."""
    from jinja2 import TemplateError

    from aipo_hpc.chat import prompt_ids
    from aipo_hpc.engines import Request

    try:
        ids = prompt_ids(tokenizer, prompt.messages)
    except (TemplateError, UnicodeError, TypeError, ValueError) as error:
        return f"chat template: {error}"
    length = len(tokenizer(prompt.messages[-1].content, add_special_tokens=False)["input_ids"])
    if length < config.min_prompt_tokens:
        return (
            f"{PROMPT_TOO_SHORT}: {length} tokens is shorter than generate.min_prompt_tokens={config.min_prompt_tokens}"
        )
    if len(ids) > config.max_prompt_tokens:
        return (
            f"{PROMPT_TOO_LONG}: {len(ids)} tokens is longer than generate.max_prompt_tokens={config.max_prompt_tokens}"
        )
    seeds = (sampling_seed(task.seed, task.iteration, prompt.prompt_id, k) for k in itertools.count())
    return [
        Request(prompt.prompt_id, k, tuple(ids), seed, temperature=temperature)
        for k, (seed, (_, temperature)) in enumerate(zip(seeds, plan(config), strict=False))
    ]


def _answer(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", config: GenerateConfig) -> list[Candidate]:
    """The source's own answer as a candidate, if it is wanted and there is one."""
    from aipo_hpc.chat import response_ids

    if not config.dataset_answer or prompt.answer is None:
        return []
    return [Candidate(prompt.answer, "stop", len(response_ids(tokenizer, prompt.answer, "stop")), "dataset")]


def _collect(
    prompts: dict[str, Prompt],
    completions: "Iterator[Completion]",
    planned: Sequence[tuple[str, float]],
    answers: dict[str, list[Candidate]],
) -> Iterator[Responses]:
    """Gather candidates by prompt; a prompt is finished when its last arrives. Its own answer comes after them."""
    gathered: dict[str, list[Completion]] = {}
    for completion in completions:
        have = gathered.setdefault(completion.request.prompt_id, [])
        have.append(completion)
        if len(have) < len(planned):
            continue
        del gathered[completion.request.prompt_id]
        prompt = prompts[completion.request.prompt_id]
        have.sort(key=lambda done: done.request.candidate)
        errors = [done.error for done in have if done.error is not None]
        candidates = [
            Candidate(done.text, done.finish_reason, done.num_tokens, planned[done.request.candidate][0])
            for done in have
        ]
        candidates = [] if errors else [*candidates, *answers[prompt.prompt_id]]
        yield Responses(prompt.prompt_id, prompt.prompt, prompt.messages, candidates, errors[0] if errors else None)


def _counts(rows: Sequence[Responses]) -> dict[str, float]:
    candidates = [candidate for row in rows for candidate in row.candidates]
    sources = sorted({candidate.source for candidate in candidates} - {"sampled"})
    return {
        "candidates": len(candidates),
        "errors": sum(row.error is not None for row in rows),
        "tokens": sum(candidate.num_tokens for candidate in candidates),
        "characters": sum(len(candidate.response) for candidate in candidates),
        "truncated": sum(candidate.finish_reason == "length" for candidate in candidates),
        **{f"candidates_{source}": sum(each.source == source for each in candidates) for source in sources},
    }
