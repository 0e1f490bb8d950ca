"""instruct: Prompt -> NewPrompt. Self-instruct: the current policy goes on with lists of tasks; what it adds becomes prompts.

Every call shows some seeds, drawn for it alone, as a numbered list (plain text, not a conversation) and takes the next tasks
of the list. Its randomness comes from (run seed, iteration, shard, call). Calls are judged in their order: a task becomes a
prompt if it passes the filters and repeats nothing in the pool, the held-out prompts, earlier iterations or this shard.

A shard ends when it has its share of ``num_prompts``, plus a ``surplus``, or when it has made ``max_calls_per_prompt`` calls
for each of them: then it has fewer. ``collect`` puts the shards together, leaves out what they made alike and cuts to exactly
``num_prompts``; the surplus stands in for what is left out there and for shards that have fewer.

Finished calls are kept as they finish. What a shard makes depends on its calls alone, in their order: not on how many were
asked for at once, nor on attempts that were killed.

Files: ``rows.parquet`` (Call rows, those that were judged), ``prompts.parquet`` (NewPrompt rows), ``dropped.parquet``.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from aipo_hpc import leaving
from aipo_hpc.engines import Engine, EngineConfig, Request, load_engine, prompts_per_batch
from aipo_hpc.harvest import DROPPED, DroppedTask, Harvest, Rules
from aipo_hpc.instruct_filters import BLOCKED_WORDS, request_text, stop_text
from aipo_hpc.progress import Progress
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Call, Clustered, NewPrompt, Prompt, read_rows, write_rows
from aipo_hpc.sampling import sample
from aipo_hpc.seed_pool import SeedPool, of_shard
from aipo_hpc.seeds import derived_seed
from aipo_hpc.settings import tuning
from aipo_hpc.suspects import Suspects
from aipo_hpc.task import Outcome, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = "prompts.parquet"
MADE = "made."
"""How the inputs are called that hold the prompts of earlier iterations."""


@dataclass(frozen=True)
class InstructConfig(EngineConfig):
    """Self-instruct: new prompts by the current policy. Defaults are the paper's (Shen et al. 2024, arXiv 2409.08845)."""

    section: ClassVar[str] = "instruct"
    num_prompts: int = 0
    """New prompts per iteration, over all shards (0: none are made, the prompts of the source are used)."""
    num_shards: int = 8
    """Shards of the array, each a task of its own."""
    num_seeds: int = 8
    """Prompts that each call shows."""
    num_machine_seeds: int = 0
    """How many of those are prompts that earlier iterations made, once there are any."""
    tasks_per_call: int = 2
    """Most new tasks that are taken from a call."""
    temperature: float = 0.5
    """Sampling temperature (0: greedy)."""
    top_p: float = 0.9
    """Nucleus probability mass."""
    top_k: int = 50
    """Most likely tokens to draw from (0: all)."""
    max_tokens: int = 1024
    """Longest continuation in tokens."""
    max_prompt_tokens: int = 4608
    """Longest list of seeds in tokens."""
    min_task_tokens: int = 4
    """Shortest new prompt in tokens of the policy, before the chat template; seeds are not shorter either."""
    max_task_tokens: int = 512
    """Longest new prompt in tokens of the policy, before the chat template; seeds are not longer either."""
    blocked_words: tuple[str, ...] = BLOCKED_WORDS
    """A task with one of these words is dropped."""
    near_duplicate: float = 0.7
    """Share of common five-letter pieces from which a task repeats another prompt (1: only the same words do)."""
    num_per_cluster: int | None = None
    """Most new prompts from the seeds of one cluster (None: as many as come)."""
    surplus: float = 0.1
    """How much more than its share a shard makes, for what shards make alike and for shards that have fewer."""
    max_calls_per_prompt: float = 10.0
    """A shard gives up after so many calls per prompt of its share."""
    min_share: float = 0.9
    """The run stops if there are fewer new prompts than this share of num_prompts."""
    resources: Resources = tuning(Resources(gpus_per_node=1, cpus_per_task=8))
    collect_resources: Resources = tuning(Resources(cpus_per_task=2, time=60))
    """Resources of the task that puts the shards' prompts together."""


def run(config: InstructConfig, task: Task) -> Outcome:
    """Make this shard's share of prompts with the input ``policy``, from seeds of the input ``pool``."""
    from aipo_hpc.chat import load_tokenizer

    tokenizer = load_tokenizer(task.inputs["policy"].model)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    wanted = share(config, task)
    suspects = Suspects(task)
    most = math.ceil(wanted * config.max_calls_per_prompt)
    calls = Calls(config, task, tokenizer, seed_pool(config, task, count), suspects, most)
    harvest = Harvest(rules(config), wanted, count, known(task))
    judged: list[str] = []
    with Progress(task, Call) as progress:
        for call in range(calls.most):
            if harvest.is_full:
                break
            if harvest.is_closed(calls.cluster(call)):
                continue
            name = calls.name(call)
            if name not in progress:
                calls.make(call, harvest.expected_calls(), harvest, progress)
            harvest.take(*progress.rows([name]))
            judged.append(name)
        outputs = progress.finish(judged)
        tokens = sum(row.num_tokens for row in progress.rows(judged))
        taken_over = progress.num_taken_over
    write_rows(task.out / PROMPTS, harvest.kept, NewPrompt)
    write_rows(task.out / DROPPED, harvest.dropped, DroppedTask)
    reasons = sorted(Counter(drop.reason for drop in harvest.dropped).items())
    counts = {
        "wanted": wanted,
        "calls": len(judged),
        "errors": harvest.num_errors,
        "tokens": tokens,
        "tasks": len(harvest.kept) + len(harvest.dropped),
        "kept": len(harvest.kept),
        **{f"dropped_{reason}": number for reason, number in reasons},
        **suspects.counts,
        "taken_over": taken_over,
    }
    return Outcome(len(harvest.kept), (*outputs, PROMPTS, DROPPED), counts)


class Calls:
    """The calls of a shard, by number, up to ``most`` of them."""

    def __init__(
        self,
        config: InstructConfig,
        task: Task,
        tokenizer: "PreTrainedTokenizerBase",
        pool: SeedPool,
        suspects: Suspects,
        most: int,
    ) -> None:
        self.most = most
        self.cluster = pool.cluster
        self._config = config
        self._task = task
        self._tokenizer = tokenizer
        self._pool = pool
        self._suspects = suspects
        self._engine: Engine | None = None
        self._where = f"{task.job} shard {task.shard}"

    def name(self, call: int) -> str:
        """The id of a call."""
        return f"{self._task.iteration:02d}-{self._task.shard:05d}-{call:06d}"

    def make(self, call: int, number: int, harvest: Harvest, progress: Progress[Call]) -> None:
        """Make ``call`` and about so many, of those after it, that are not there and can still be of use.

        Batches keep the composition that they have in an undisturbed shard, so whole batches are asked for again.
        """
        leaving.here(self._where)
        size = prompts_per_batch(self._config)
        rows: dict[str, Call] = {}
        requests: dict[str, list[Request]] = {}
        batches: list[Sequence[str]] = []
        for start in range(call // size * size, min(self.most, call + number), size):
            batch = range(start, min(self.most, start + size))
            if all(self.name(each) in progress or harvest.is_closed(self.cluster(each)) for each in batch):
                continue
            names: list[str] = []
            for each in batch:
                row, request = self._ask(each)
                if row.call_id in self._suspects.guilty:
                    row = replace(row, error=self._suspects.reason)
                if row.error is not None and row.call_id not in progress:
                    progress.append(row)
                if request is not None:
                    rows[row.call_id], requests[row.call_id] = row, [request]
                    names.append(row.call_id)
            batches.append(names)
        rounds = self._suspects.rounds(batches, progress)
        for done in sample(rounds, size, requests, progress, self._suspects, self._loaded, self._where):
            name = done.request.prompt_id
            if name not in progress:
                progress.append(
                    replace(
                        rows[name],
                        text=done.text,
                        finish_reason=done.finish_reason,
                        num_tokens=done.num_tokens,
                        error=done.error,
                    )
                )
        leaving.here(self._where)

    def _loaded(self) -> Engine:
        """The engine, which is loaded once and not before it is needed."""
        if self._engine is None:
            self._engine = load_engine(self._config, self._task.inputs["policy"].model)
        return self._engine

    def _ask(self, call: int) -> tuple[Call, Request | None]:
        """The row of a call before it is made, and its request; none where the row says why it cannot be made."""
        config, task = self._config, self._task
        identity = (task.seed, task.iteration, task.shard, call)
        seeds = self._pool.draw(call, derived_seed("seeds", *identity), config.num_seeds, config.num_machine_seeds)
        row = Call(self.name(call), seeds.cluster, [prompt.prompt_id for prompt in seeds.prompts], "", "error", 0)
        ids = self._tokenizer(request_text([prompt.prompt for prompt in seeds.prompts]))["input_ids"]
        if len(ids) > config.max_prompt_tokens:
            error = f"seeds of {len(ids)} tokens are longer than instruct.max_prompt_tokens={config.max_prompt_tokens}"
            return replace(row, error=error), None
        stop = stop_text(len(seeds.prompts), config.tasks_per_call)
        return row, Request(row.call_id, 0, tuple(ids), derived_seed("call", *identity), (stop,))


def share(config: InstructConfig, task: Task) -> int:
    """How many prompts this shard is to make: parts of the whole, surplus included, that differ by one at most."""
    total = math.ceil(config.num_prompts * (1 + config.surplus))
    start, end = (total * edge // task.num_shards for edge in (task.shard, task.shard + 1))
    return end - start


def rules(config: InstructConfig) -> Rules:
    """What is kept, by the settings."""
    return Rules(
        tasks_per_call=config.tasks_per_call,
        blocked_words=config.blocked_words,
        min_tokens=config.min_task_tokens,
        max_tokens=config.max_task_tokens,
        near_duplicate=config.near_duplicate,
        num_per_cluster=config.num_per_cluster,
        max_calls_per_prompt=config.max_calls_per_prompt,
    )


def seed_pool(config: InstructConfig, task: Task, count: Callable[[str], int]) -> SeedPool:
    """The seeds of this shard: the pool, its clusters if there are any, and what earlier iterations made."""
    pool = list(read_rows(task.inputs["pool"].files, Prompt))
    clusters: dict[int, list[Prompt]] = {}
    if "clusters" in task.inputs:
        of = {row.prompt_id: row.cluster for row in read_rows(task.inputs["clusters"].files, Clustered)}
        for prompt in pool:
            clusters.setdefault(of[prompt.prompt_id], []).append(prompt)
    return SeedPool(
        pool,
        made(task),
        of_shard(clusters, task.shard, task.num_shards),
        lambda text: config.min_task_tokens <= count(text) <= config.max_task_tokens,
    )


def made(task: Task) -> list[Prompt]:
    """The prompts that earlier iterations made."""
    names = sorted(name for name in task.inputs if name.startswith(MADE))
    return [row for name in names for row in read_rows(task.inputs[name].files, Prompt)]


def known(task: Task) -> dict[str, list[str]]:
    """What new prompts must not repeat, by what it is."""
    return {
        "pool": [prompt.prompt for prompt in read_rows(task.inputs["pool"].files, Prompt)],
        "held_out": [prompt.prompt for prompt in read_rows(task.inputs["held_out"].files, Prompt)],
        "earlier": [prompt.prompt for prompt in made(task)],
    }
