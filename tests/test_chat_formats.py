"""Published chat data in the forms that it comes in: what becomes of a row, and which rows are refused."""

from typing import Any

import pytest

from aipo_hpc.chat_formats import Answers, answers_of, prompt_of, turns_of
from aipo_hpc.errors import DataError
from aipo_hpc.rows import Message

ULTRAFEEDBACK_BINARIZED: dict[str, Any] = {
    "prompt": "Why is the sky blue?",
    "prompt_id": "f0e37e9f",
    "chosen": [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Short waves scatter more."},
    ],
    "rejected": [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "It is not."}],
    "messages": [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Short waves scatter more."},
    ],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
ULTRAFEEDBACK: dict[str, Any] = {
    "source": "evol_instruct",
    "instruction": "Name a river.",
    "models": ["a", "b", "c", "d"],
    "completions": [
        {"model": "a", "response": "The Nile.", "overall_score": 8.5, "fine-grained_score": 4.5},
        {"model": "b", "response": "Rivers are long.", "overall_score": 4.0, "fine-grained_score": 3.25},
        {"model": "c", "response": "", "overall_score": 1, "fine-grained_score": 1},
        {"model": "d", "response": "The Rhine.", "overall_score": 8.5, "fine-grained_score": 4.75},
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
SHAREGPT: dict[str, Any] = {
    "id": "QWJhYvA_0",
    "conversations": [
        {"from": "gpt", "value": "How can I help?"},
        {"from": "human", "value": "Hi."},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Name a tree."},
        {"from": "gpt", "value": "Oak."},
    ],
}


def prompt(row: dict[str, Any], column: str = "prompt") -> tuple[str, list[Message]]:
    asked = prompt_of("f.jsonl, line 1", row, column, "data.prompt_column")
    return asked.text, asked.messages


def test_ultrafeedback_binarized_has_a_prompt_and_two_scored_answers() -> None:
    assert prompt(ULTRAFEEDBACK_BINARIZED) == (
        "Why is the sky blue?",
        [Message("user", "Why is the sky blue?")],
    )
    assert answers_of("w", ULTRAFEEDBACK_BINARIZED, "overall_score") == Answers(
        ["Short waves scatter more.", "It is not."], [8.5, 3.0]
    )


def test_ultrafeedback_has_an_instruction_and_completions_with_a_score_of_choice() -> None:
    assert prompt(ULTRAFEEDBACK) == ("Name a river.", [Message("user", "Name a river.")])
    responses = ["The Nile.", "Rivers are long.", "", "The Rhine."]
    assert answers_of("w", ULTRAFEEDBACK, "overall_score") == Answers(responses, [8.5, 4, 1, 8.5])
    assert answers_of("w", ULTRAFEEDBACK, "fine-grained_score") == Answers(responses, [4.5, 3.25, 1, 4.75])


def test_sharegpt_conversations_begin_and_end_with_the_user() -> None:
    text, messages = prompt(SHAREGPT)
    assert messages == [Message("user", "Hi."), Message("assistant", "Hello."), Message("user", "Name a tree.")]
    assert text == "Hi.\n\nHello.\n\nName a tree."
    system = {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "Why?"}]}
    assert prompt(system)[1] == [Message("system", "Be brief."), Message("user", "Why?")]


def test_a_datasets_own_answer_is_the_first_after_the_users_last_turn() -> None:
    assert prompt_of("w", SHAREGPT, "prompt", "data.prompt_column").answer == "Oak."
    assert prompt_of("w", ULTRAFEEDBACK_BINARIZED, "prompt", "data.prompt_column").answer == "Short waves scatter more."
    assert prompt_of("w", {"prompt": "Why?"}, "prompt", "data.prompt_column").answer is None


def test_openai_messages_may_have_their_text_in_parts() -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a bird."}]
    assert prompt({"messages": [{"role": "user", "content": parts}]}) == (
        "Name a bird.",
        [Message("user", "Name a bird.")],
    )


def test_alpacas_input_belongs_to_its_instruction() -> None:
    assert (
        prompt({"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"})[0]
        == "Translate.\n\nGuten Tag"
    )
    assert prompt({"instruction": "Say hello.", "input": "", "output": "Hello"})[0] == "Say hello."


def test_trls_forms_of_preferences_have_answers_as_text_or_as_messages_with_or_without_a_prompt() -> None:
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "So."), ("assistant", "No."))
    )
    plain = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    conversational = {"prompt": [user], "chosen": [good], "rejected": [bad]}
    implicit = {"chosen": [user, good], "rejected": [user, bad]}
    for row in (plain, conversational, implicit):
        assert prompt(row) == ("Why?", [Message("user", "Why?")])
        assert answers_of("w", row, "overall_score") == Answers(["So.", "No."], [1.0, 0.0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "w: no column 'prompt'; there are ['text']. Set data.prompt_column to the one that holds"),
        ({"conversations": [{"from": "martian", "value": "a"}]}, "w: a turn is from 'martian'; known are human, user"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "w: 'messages' has no user turn. Remove the row"),
        ({"conversations": [{"from": "human"}]}, "w: 'messages' must be a list of {role, content}; got [{'from'"),
        ({"messages": ["Hi."]}, "w: 'messages' must be a list of {role, content}; got ['Hi.']"),
        ({"prompt": {"text": "a"}}, "w: column 'prompt' holds dict, not text."),
        ({"instruction": " "}, "w: column 'instruction' is empty. Remove the row."),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "w: a turn has a part of type 'image_url'; only text can be used. Remove the row.",
        ),
    ],
)
def test_a_row_without_a_prompt_is_refused_with_what_is_there(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        prompt_of("w", row, "prompt", "data.prompt_column")
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "w: no column 'completions', and none of rejected; there are ['chosen', 'prompt'].",
        ),
        (
            {"completions": [{"response": "a"}]},
            "w: each of 'completions' must have a response and 'overall_score'; got",
        ),
        (
            {"completions": [{"response": "a", "overall_score": "N/A"}]},
            "w: 'overall_score' of a completion is no number (could not convert string to float: 'N/A'). Remove the row.",
        ),
        (
            {"chosen": [{"role": "user", "content": "a"}], "rejected": "b"},
            "w: an answer must be text or a conversation that ends with the assistant. Remove the row.",
        ),
    ],
)
def test_a_row_without_scored_answers_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        answers_of("w", row, "overall_score")
    assert str(raised.value).startswith(message)


def test_a_turn_whose_content_is_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="role and content must be text; got 'user' and None"):
        turns_of("w", [{"role": "user", "content": None}])
