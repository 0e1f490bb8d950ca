"""preferences: preference data -> Ranked rows. Runs where the run is launched, before anything is submitted.

The answers of a dataset stand for sampled ones, its preferences for a ranking: ``generate`` and ``rank`` are left out, and
all that comes after them is the same. Sources are spelled as in ``aipo_hpc.sources``, with rows of prompt, chosen and
rejected, or of completions with scores (``aipo_hpc.chat_formats``). Which two answers become a pair is said by
``pairs.selection``; answers with equal scores make none. Prompts that are held out for evaluation are left out.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from aipo_hpc.chat_formats import answers_of, prompt_of
from aipo_hpc.errors import DataError
from aipo_hpc.rows import Candidate, Prompt, Ranked, read_rows, write_rows
from aipo_hpc.settings import tuning
from aipo_hpc.sources import Source, rows_of
from aipo_hpc.stages.prompts import id_of, order, sources_of
from aipo_hpc.task import Outcome, Task

PREFERENCES = "rows.parquet"


@dataclass(frozen=True)
class PreferencesConfig:
    """A dataset's own answers and preferences, instead of sampled and ranked ones."""

    source: str = ""
    """Preference data, datasets as ``prompts`` names them (empty: answers are sampled and ranked)."""
    split: str = "train"
    """Split of Hugging Face datasets that are named without one."""
    revision: str | None = None
    """Revision of Hugging Face datasets that are named without one (None: the newest)."""
    prompt_column: str = "prompt"
    """Column that holds the prompt."""
    id_column: str = "prompt_id"
    """Column that holds the prompt's id; where it is absent, the id is a hash of the text."""
    score: str = "overall_score"
    """Field of a completion that holds its score (UltraFeedback: overall_score, fine-grained_score)."""
    limit: int | None = None
    """Use only the first so many rows of each source."""
    skip_unusable: bool = False
    """Leave out rows that cannot be used, and count them, instead of refusing the source."""
    in_order: bool = False
    """Keep the order of the sources instead of shuffling them."""
    num_proc: int = tuning(1)
    """Processes that read a Hugging Face dataset."""


def run(config: PreferencesConfig, task: Task) -> Outcome:
    """Read and check the sources; tokens are counted as those of the input ``policy``.

    Raises DataError when one is missing, empty, malformed (with the line number), or nothing of it can be used.
    """
    from aipo_hpc.chat import load_tokenizer, response_ids

    tokenizer = load_tokenizer(task.inputs["policy"].model)

    def candidate(response: str) -> Candidate:
        return Candidate(response, "stop", len(response_ids(tokenizer, response, "stop")), "dataset")

    held_out = set[str]()
    for prompt in read_rows(task.inputs["held_out"].files, Prompt):
        held_out |= {prompt.prompt_id, prompt.prompt}
    rows: list[Ranked] = []
    counts: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for source in sources_of(task):
        found = list(islice(read(source, config, counts, candidate), config.limit))
        if not found:
            raise DataError(f"{source.name}: no preferences in it. Give a source with at least one row.")
        places = sorted(range(len(found)), key=lambda place: order(task.seed, found[place].prompt_id))
        used = places[: max(1, round(source.part * len(found)))]
        for row in (found[place] for place in (sorted(used) if config.in_order else used)):
            if row.prompt_id in held_out or row.prompt in held_out:
                counts["held_out"] += 1
                continue
            taken[row.prompt_id] += 1
            number = taken[row.prompt_id]  # a prompt may have several pairs of answers, and each becomes a row
            rows.append(row if number == 1 else replace(row, prompt_id=f"{row.prompt_id}-{number}"))
    if not rows:
        raise DataError(f"{task.job}: all prompts with preferences are held out. Lower data.num_held_out.")
    if not config.in_order:
        rows.sort(key=lambda row: order(task.seed, row.prompt_id))
    write_rows(task.out / PREFERENCES, rows, Ranked)
    num_candidates = sum(len(row.candidates) for row in rows)
    return Outcome(len(rows), (PREFERENCES,), {"prompts": len(rows), "candidates": num_candidates, **counts})


def read(
    source: Source, config: PreferencesConfig, counts: Counter[str], candidate: Callable[[str], Candidate]
) -> Iterator[Ranked]:
    """Yield the rows of a source in its own order; with ``skip_unusable``, rows that were left out are counted."""
    for where, row in rows_of(source, config.split, config.num_proc):
        try:
            asked = prompt_of(where, row, config.prompt_column, "preferences.prompt_column")
            answers = answers_of(where, row, config.score)
        except DataError:
            if not config.skip_unusable:
                raise
            counts["unusable"] += 1
            continue
        candidates = [candidate(response) for response in answers.responses]
        yield Ranked(
            id_of(row, config.id_column, asked.text),
            asked.text,
            asked.messages,
            candidates,
            answers.scores,
            ranks(answers.scores),
            [False] * len(candidates),
        )


def ranks(scores: Sequence[float]) -> list[int]:
    """1 is best; ties share the better rank."""
    return [1 + sum(other > score for other in scores) for score in scores]
