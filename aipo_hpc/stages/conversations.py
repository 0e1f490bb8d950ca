"""conversations: chat data -> Conversation rows, checked. Runs where the run is launched, before anything is submitted.

Source: whatever ``prompts`` reads, with a column of conversations: lists of {role, content}, in which the assistant has a
turn. Order is by a hash of run seed and conversation, so it does not depend on the source's order.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from aipo_hpc.errors import DataError
from aipo_hpc.rows import Conversation, write_rows
from aipo_hpc.settings import tuning
from aipo_hpc.stages.prompts import order, rows_of, turns_of
from aipo_hpc.task import Outcome, Task

CONVERSATIONS = "conversations.parquet"


@dataclass(frozen=True)
class ConversationsConfig:
    """Chat data for supervised fine-tuning, which comes first if there is a source."""

    source: str = ""
    """Where conversations come from: a Hugging Face dataset id, or a local file (empty: no supervised fine-tuning)."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    revision: str | None = None
    """Revision of a Hugging Face dataset (None: the newest)."""
    messages_column: str = "messages"
    """Column that holds the conversation."""
    limit: int | None = None
    """Use only the first so many conversations of the source."""
    num_proc: int = tuning(1)
    """Processes that read a Hugging Face dataset."""


def run(config: ConversationsConfig, task: Task) -> Outcome:
    """Read and check the source named by the input ``source``; a conversation that is there twice is kept once.

    Raises DataError when it is missing, empty, malformed (with the line number), or lacks the column.
    """
    source = task.inputs["source"].model
    found: dict[str, Conversation] = {}
    number = 0
    for number, conversation in enumerate(read(source, config), 1):
        found.setdefault(conversation.conversation_id, conversation)
        if config.limit is not None and number >= config.limit:
            break
    if not found:
        raise DataError(f"{source}: no conversations in it. Give a source with at least one row.")
    rows = sorted(found.values(), key=lambda row: order(task.seed, row.conversation_id))
    write_rows(task.out / CONVERSATIONS, rows, Conversation)
    return Outcome(len(rows), (CONVERSATIONS,), {"conversations": len(rows), "repeated": number - len(rows)})


def read(source: str, config: ConversationsConfig) -> Iterator[Conversation]:
    """Yield the conversations of a file or dataset, up to the assistant's last turn each, in its own order."""
    for where, row in rows_of(source, config.split, config.revision, config.num_proc):
        if config.messages_column not in row:
            raise DataError(
                f"{where}: no column {config.messages_column!r}; there are {sorted(row)}. "
                "Set conversations.messages_column to the one that holds the conversation."
            )
        turns = turns_of(where, row[config.messages_column])
        while turns and turns[-1].role != "assistant":
            turns.pop()
        if not turns:
            raise DataError(f"{where}: the assistant says nothing in it. Remove the row.")
        text = json.dumps([asdict(turn) for turn in turns], ensure_ascii=True)
        yield Conversation(hashlib.sha256(text.encode()).hexdigest()[:16], turns)
