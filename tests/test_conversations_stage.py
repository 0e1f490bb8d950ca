"""Chat data: what is kept of it, in which order, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from aipo_hpc.errors import DataError
from aipo_hpc.rows import Conversation, Message, read_rows
from aipo_hpc.stages.conversations import ConversationsConfig, run
from aipo_hpc.task import Input, Outcome, Task

USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}


def read(folder: Path, rows: list[Any], **config: Any) -> tuple[Outcome, list[Conversation]]:
    out = folder / "out"
    out.mkdir(parents=True)
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task("iter-00/conversations", 0, 0, 1, 7, {"source": Input(value=str(source))}, out)
    outcome = run(ConversationsConfig(**config), task)
    return outcome, list(read_rows([out / "conversations.parquet"], Conversation))


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"what is {number}?"}, {"role": "assistant", "content": str(number)}]


def test_a_conversation_ends_with_the_assistant_and_is_kept_once(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ANSWER, USER]}, {"messages": chat(1)}, {"messages": [USER, ANSWER]}]
    outcome, found = read(tmp_path, rows)
    assert outcome.counts == {"conversations": 2, "repeated": 1}
    assert [Message("user", "why?"), Message("assistant", "because")] in [row.messages for row in found]


def test_the_order_does_not_depend_on_the_sources(tmp_path: Path) -> None:
    rows = [{"messages": chat(number)} for number in range(9)]
    _, one = read(tmp_path / "one", rows)
    _, other = read(tmp_path / "other", rows[::-1])
    assert one == other != sorted(one, key=lambda row: row.messages[0].content)


def test_the_column_and_the_limit_are_the_recipes(tmp_path: Path) -> None:
    _, found = read(tmp_path, [{"chat": chat(number)} for number in range(9)], messages_column="chat", limit=4)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"line 1: no column 'messages'; there are \['prompt'\]. Set conversations.messages_column"),
        ({"messages": [USER]}, "line 1: the assistant says nothing in it"),
        ({"messages": "why?"}, "line 1: 'messages' must be a list"),
        ({"messages": [{"role": "user", "content": 3}]}, "role and content must be text"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, [row])


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no conversations in it"):
        read(tmp_path, [])
