"""prompts: prompt sources -> Prompt rows, checked and split. Runs where the run is launched, before anything is submitted.

Sources are spelled as in ``aipo_hpc.sources`` and may have any of the forms of ``aipo_hpc.chat_formats``. Order is by a hash of
run seed and prompt id, so it does not depend on the sources' order; the first ``num_held_out`` prompts of that order are kept
for evaluation and never trained on.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from aipo_hpc.chat_formats import prompt_of
from aipo_hpc.errors import DataError
from aipo_hpc.rows import Prompt, write_rows
from aipo_hpc.settings import tuning
from aipo_hpc.sources import KIND, Source, parse, rows_of
from aipo_hpc.task import Outcome, Task

TRAIN = "train.parquet"
HELD_OUT = "held_out.parquet"


@dataclass(frozen=True)
class PromptsConfig:
    """How the prompt sources are read."""

    split: str = "train"
    """Split of Hugging Face datasets that are named without one."""
    revision: str | None = None
    """Revision of Hugging Face datasets that are named without one (None: the newest)."""
    prompt_column: str = "prompt"
    """Column that holds the prompt's text."""
    id_column: str = "prompt_id"
    """Column that holds the prompt's id; where it is absent, the id is a hash of the text."""
    limit: int | None = None
    """Use only the first so many prompts of each source."""
    num_held_out: int = 256
    """Prompts kept for evaluation, never trained on."""
    skip_unusable: bool = False
    """Leave out rows that cannot be used, and count them, instead of refusing the source."""
    num_proc: int = tuning(1)
    """Processes that read a Hugging Face dataset."""


def run(config: PromptsConfig, task: Task) -> Outcome:
    """Read, check and split the sources.

    Raises DataError when one is missing, empty, malformed (with the line number), lacks the column, or repeats an id.
    """
    found: dict[str, Prompt] = {}
    unusable: list[str] = []
    sources = sources_of(task)
    repeated = 0
    for source in sources:
        prompts = check(read(source, config, unusable), source.name, config)
        prompts.sort(key=lambda prompt: order(task.seed, prompt.prompt_id))
        for prompt in prompts[: max(1, round(source.part * len(prompts)))]:
            known = found.setdefault(prompt.prompt_id, prompt)
            if known.prompt != prompt.prompt:
                raise DataError(
                    f"{source.name}: has another prompt with the id {prompt.prompt_id!r} than a source before it. Ids must be "
                    "unique: name an id column that is not there (data.id_column=none), and ids are made of the texts."
                )
            repeated += known is not prompt
    prompts = sorted(found.values(), key=lambda prompt: order(task.seed, prompt.prompt_id))
    if len(prompts) <= config.num_held_out:
        raise DataError(
            f"{' + '.join(source.name for source in sources)}: {len(prompts)} prompts, of which "
            f"data.num_held_out={config.num_held_out} are kept for evaluation: "
            "none is left to train on. Lower data.num_held_out or give more prompts."
        )
    held_out, train = prompts[: config.num_held_out], prompts[config.num_held_out :]
    write_rows(task.out / TRAIN, train, Prompt)
    write_rows(task.out / HELD_OUT, held_out, Prompt)
    counts = {"train": len(train), "held_out": len(held_out), "repeated": repeated, "unusable": len(unusable)}
    return Outcome(len(prompts), (TRAIN, HELD_OUT), {name: number for name, number in counts.items() if number})


def sources_of(task: Task) -> list[Source]:
    """The sources among a task's inputs, in their order."""
    return [parse(task.inputs[name].model) for name in sorted(task.inputs) if name.startswith(KIND)]


def order(seed: int, prompt_id: str) -> bytes:
    """The sort key that shuffles prompts by content."""
    return hashlib.sha256(f"{seed}\0{prompt_id}".encode("utf-8", "surrogatepass")).digest()


def check(prompts: Iterable[Prompt], source: str, config: PromptsConfig) -> list[Prompt]:
    """Collect prompts up to the limit; raises DataError on a repeated id or when there is none."""
    checked: dict[str, Prompt] = {}
    for number, prompt in enumerate(prompts, 1):
        if prompt.prompt_id in checked:
            raise DataError(
                f"{source}: row {number} repeats prompt_id {prompt.prompt_id!r} "
                f"(prompt {prompt.prompt[:60]!r}). Ids must be unique: mend the file, or remove the id column "
                "and identical prompts."
            )
        checked[prompt.prompt_id] = prompt
        if config.limit is not None and number >= config.limit:
            break
    if not checked:
        raise DataError(f"{source}: no prompts in it. Give a source with at least one row.")
    return list(checked.values())


def read(source: Source, config: PromptsConfig, unusable: list[str]) -> Iterator[Prompt]:
    """Yield the prompts of a source in its own order; with ``skip_unusable``, why rows were left out goes to ``unusable``."""
    for where, row in rows_of(source, config.split, config.num_proc):
        try:
            yield _prompt(where, row, config)
        except DataError as error:
            if not config.skip_unusable:
                raise
            unusable.append(str(error))


def _prompt(where: str, row: dict[str, Any], config: PromptsConfig) -> Prompt:
    asked = prompt_of(where, row, config.prompt_column, "data.prompt_column")
    return Prompt(id_of(row, config.id_column, asked.text), asked.text, asked.messages, asked.answer)


def id_of(row: dict[str, Any], column: str, text: str) -> str:
    """The id that a row gives its prompt, or a hash of the text."""
    given = row.get(column)
    return str(given) if given is not None else hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
