"""conversations: chat data -> Conversation rows, checked. Runs where the run is launched, before anything is submitted.

Sources: whatever ``prompts`` reads, with a column of conversations (``messages``, or ``conversations`` as ShareGPT has it) in
which the assistant has a turn. Order is by a hash of run seed and conversation, so it does not depend on the source's order.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from aipo_hpc.chat_formats import conversation_of, turns_of
from aipo_hpc.errors import DataError
from aipo_hpc.rows import Conversation, write_rows
from aipo_hpc.settings import tuning
from aipo_hpc.sources import Source, rows_of
from aipo_hpc.stages.prompts import order, sources_of
from aipo_hpc.task import Outcome, Task

CONVERSATIONS = "conversations.parquet"


@dataclass(frozen=True)
class ConversationsConfig:
    """Chat data for supervised fine-tuning, which comes first if there is a source."""

    source: str = ""
    """Where conversations come from: datasets as ``prompts`` names them (empty: no supervised fine-tuning)."""
    split: str = "train"
    """Split of Hugging Face datasets that are named without one."""
    revision: str | None = None
    """Revision of Hugging Face datasets that are named without one (None: the newest)."""
    messages_column: str = "messages"
    """Column that holds the conversation."""
    limit: int | None = None
    """Use only the first so many conversations of each source."""
    skip_unusable: bool = False
    """Leave out rows that cannot be used, and count them, instead of refusing the source."""
    num_proc: int = tuning(1)
    """Processes that read a Hugging Face dataset."""


def run(config: ConversationsConfig, task: Task) -> Outcome:
    """Read and check the sources; a conversation that is there twice is kept once.

    Raises DataError when one is missing, empty, malformed (with the line number), or lacks the column.
    """
    found: dict[str, Conversation] = {}
    unusable: list[str] = []
    number = 0
    for source in sources_of(task):
        read_ones = list(islice(read(source, config, unusable), config.limit))
        if not read_ones:
            raise DataError(f"{source.name}: no conversations in it. Give a source with at least one row.")
        read_ones.sort(key=lambda row: order(task.seed, row.conversation_id))
        used = read_ones[: max(1, round(source.part * len(read_ones)))]
        number += len(used)
        for conversation in used:
            found.setdefault(conversation.conversation_id, conversation)
    rows = sorted(found.values(), key=lambda row: order(task.seed, row.conversation_id))
    write_rows(task.out / CONVERSATIONS, rows, Conversation)
    counts = {"conversations": len(rows), "repeated": number - len(rows)}
    return Outcome(len(rows), (CONVERSATIONS,), counts | ({"unusable": len(unusable)} if unusable else {}))


def read(source: Source, config: ConversationsConfig, unusable: list[str]) -> Iterator[Conversation]:
    """Yield the conversations of a source, up to the assistant's last turn each, in its own order.

    With ``skip_unusable``, why rows were left out goes to ``unusable``.
    """
    for where, row in rows_of(source, config.split, config.num_proc):
        try:
            yield _conversation(where, row, config)
        except DataError as error:
            if not config.skip_unusable:
                raise
            unusable.append(str(error))


def _conversation(where: str, row: dict[str, Any], config: ConversationsConfig) -> Conversation:
    messages = row[config.messages_column] if config.messages_column in row else conversation_of(row)
    if messages is None:
        raise DataError(
            f"{where}: no column {config.messages_column!r}; there are {sorted(row)}. "
            "Set conversations.messages_column to the one that holds the conversation."
        )
    turns = turns_of(where, messages)
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"{where}: the assistant says nothing in it. Remove the row.")
    text = json.dumps([asdict(turn) for turn in turns], ensure_ascii=True)
    return Conversation(hashlib.sha256(text.encode()).hexdigest()[:16], turns)
