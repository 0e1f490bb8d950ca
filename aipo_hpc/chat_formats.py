"""Rows of published chat data as conversations, whichever of the usual forms they have.

prompt                                  plain text, or a list of messages
messages: [{role, content}]             OpenAI; content is text, or parts of which all are text
conversations: [{from, value}]          FastChat and ShareGPT: human, gpt, system, and their usual other names
instruction, input                      Alpaca; UltraFeedback with its completions
prompt, chosen, rejected                UltraFeedback binarized, TRL: the answers as text, or as whole conversations
instruction, completions                UltraFeedback: several answers with scores
"""

from dataclasses import dataclass, replace
from typing import Any

from aipo_hpc.errors import DataError
from aipo_hpc.rows import Message

_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Asked:
    """What a row asks: as text, as a conversation up to the user's last turn, and the row's own answer if it has one."""

    text: str
    messages: list[Message]
    answer: str | None = None


@dataclass(frozen=True)
class Answers:
    """The answers of one row, with a score each; more is better."""

    responses: list[str]
    scores: list[float]


def turns_of(where: str, messages: Any) -> list[Message]:
    """The turns of a conversation. Raises DataError for what is none."""
    try:
        turns = [_turn(where, turn) for turn in messages]
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{where}: 'messages' must be a list of {{role, content}}; got {str(messages)[:80]}."
        ) from error
    for turn in turns:
        if not isinstance(turn.role, str) or not isinstance(turn.content, str):
            raise DataError(
                f"{where}: a turn's role and content must be text; got {turn.role!r:.40} and {turn.content!r:.40}."
            )
    return turns


def _turn(where: str, turn: Any) -> Message:
    if "from" in turn and "role" not in turn:
        role = _ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise DataError(f"{where}: a turn is from {turn['from']!r}; known are {', '.join(_ROLES)}. Remove the row.")
        return Message(role, turn["value"])
    content = turn["content"]
    if isinstance(content, list):
        kinds = [part["type"] for part in content if part["type"] != "text"]
        if kinds:
            raise DataError(f"{where}: a turn has a part of type {kinds[0]!r}; only text can be used. Remove the row.")
        content = "".join(part["text"] for part in content)
    return Message(turn["role"], content)


def conversation_of(row: dict[str, Any]) -> Any:
    """What a row holds as its conversation, or None; at last its chosen answer, if that is a whole one."""
    chosen = row.get("chosen")
    return row.get("messages") or row.get("conversations") or (chosen if isinstance(chosen, list) else None)


def asked_of(where: str, messages: Any) -> Asked:
    """The turns from the first of system or user to the user's last, and the dataset's own answer to it."""
    turns = turns_of(where, messages)
    while turns and turns[0].role == "assistant":
        turns.pop(0)
    end = max((position for position, turn in enumerate(turns, 1) if turn.role == "user"), default=0)
    if not end:
        raise DataError(f"{where}: 'messages' has no user turn. Remove the row or add the user's message.")
    answers = [turn.content for turn in turns[end:] if turn.role == "assistant"]
    text = "\n\n".join(turn.content for turn in turns[:end])
    return Asked(text, turns[:end], answers[0] if answers else None)


def prompt_of(where: str, row: dict[str, Any], column: str, setting: str) -> Asked:
    """What a row asks. Raises DataError if there is nothing; ``setting`` names the column's, for messages."""
    messages = conversation_of(row)
    if isinstance(value := row.get(column), list):
        return asked_of(where, value)
    if column in row:
        if not isinstance(value, str):
            raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, not text.")
        text = value
    elif isinstance(row.get("instruction"), str):
        column, text = "instruction", row["instruction"]
        if isinstance(row.get("input"), str) and row["input"].strip():
            text = f"{text}\n\n{row['input']}"
    elif messages:
        text = asked_of(where, messages).text
    else:
        raise DataError(
            f"{where}: no column {column!r}; there are {sorted(row)}. Set {setting} to the one that holds the prompt."
        )
    if not text.strip():
        raise DataError(f"{where}: column {column!r} is empty. Remove the row.")
    return replace(asked_of(where, messages), text=text) if messages else Asked(text, [Message("user", text)])


def answers_of(where: str, row: dict[str, Any], score: str) -> Answers:
    """The scored answers of a row: completions with the field ``score``, or chosen and rejected.

    Chosen and rejected have scores 1 and 0 where the dataset gives none. Raises DataError where there are none.
    """
    if "completions" in row:
        return _completions(where, row["completions"], score)
    missing = [name for name in ("chosen", "rejected") if not row.get(name)]
    if missing:
        raise DataError(
            f"{where}: no column 'completions', and none of {', '.join(missing)}; there are {sorted(row)}. Give a dataset "
            "with prompt, chosen and rejected, or with completions."
        )
    responses = [_answer(where, row[name]) for name in ("chosen", "rejected")]
    given = [row.get(f"score_{name}") for name in ("chosen", "rejected")]
    scored = all(isinstance(value, (int, float)) for value in given)
    return Answers(responses, [float(value) for value in given if value is not None] if scored else [1.0, 0.0])


def _completions(where: str, completions: Any, score: str) -> Answers:
    try:
        found = [(completion["response"], completion[score]) for completion in completions]
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{where}: each of 'completions' must have a response and {score!r}; got {str(completions)[:80]}. "
            "Set preferences.score to the field that holds the score."
        ) from error
    try:
        return Answers([str(response) for response, _ in found], [float(value) for _, value in found])
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {score!r} of a completion is no number ({error}). Remove the row.") from error


def _answer(where: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    turns = turns_of(where, value)
    if not turns or turns[-1].role != "assistant":
        raise DataError(
            f"{where}: an answer must be text or a conversation that ends with the assistant. Remove the row."
        )
    return turns[-1].content
