"""Self-instruct's text: the list that is put to the model, and what of its continuation is good for a prompt."""

import pytest

from aipo_hpc.instruct_filters import (
    capitalized,
    request_text,
    stop_text,
    tasks_of,
    unfit,
    unfit_length,
    without_answer,
)


def test_seeds_are_a_numbered_list_on_one_line_each_that_breaks_off_at_the_next_number() -> None:
    seeds = ["What is the relation between the given pairs?\n\nNight : Day :: Right : Left", "Rewrite the sentence:"]
    assert request_text(seeds) == (
        "Come up with a series of tasks:\n\n"
        "1. What is the relation between the given pairs? Night : Day :: Right : Left\n"
        "2. Rewrite the sentence\n"
        "3."
    )
    assert stop_text(8, 2) == "\n11.", "tasks 9 and 10 are wanted"


def test_a_continuation_is_cut_into_tasks_at_its_numbers() -> None:
    text = " Name three  rivers.\n10. Explain why\n    the sky is blue.\n11 . Count to 3. 4 comes next.\n12."
    assert tasks_of(text) == ["Name three rivers.", "Explain why the sky is blue.", "Count to 3. 4 comes next."]
    assert tasks_of("") == [""], "a model that says nothing has one task, which is empty"
    assert tasks_of(" Round 3.14 to one digit.\n3.14 is pi.") == ["Round 3.14 to one digit. 3.14 is pi."]


def test_only_the_first_letter_becomes_a_capital() -> None:
    assert capitalized("translate to French: I live in Paris, USA.") == "Translate to French: I live in Paris, USA."
    assert capitalized("") == ""


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("What is the capital of Peru? Answer: Lima", "What is the capital of Peru?"),
        ("Add 2 and 3. OUTPUT: 5", "Add 2 and 3."),
        ("Solve x + 1 = 2. Solution: x = 1", "Solve x + 1 = 2."),
        ("Q: Who wrote Faust? A: Goethe", "Q: Who wrote Faust?"),
        ("Answer: Lima", ""),
        ("Summarize this data: 3, 4, 5.", "Summarize this data: 3, 4, 5."),
        ("Explain these formula: a + b", "Explain these formula: a + b"),
        ("Describe the agenda: who speaks, a: first, b: second", "Describe the agenda: who speaks,"),
        ("Classify the mood. Example: I won! Answer: happy. Now: I lost.", None),
        ("Give me an answer in one word.", None),
    ],
)
def test_what_follows_an_answer_is_cut_away_at_whole_words_only(text: str, left: str | None) -> None:
    assert without_answer(text) == (text if left is None else left)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Write a story about a dog.", None),
        ("", "empty"),
        ("Write a program that sorts numbers.", "write_a_program"),
        ("write a Program in C.", "write_a_program"),
        ("Write a programme for the concert.", "write_a_program"),
        ("Detailed instructions: read the text.", "detailed_instructions"),
        ("Task definition: you are given a text.", "task_definition"),
        ("- Name a river.", "punctuation_first"),
        ('"To be or not to be": who says that?', "punctuation_first"),
        ("¿Qué hora es?", "not_ascii_first"),
        ("写一首诗。", "not_ascii_first"),
        ("Describe the image below.", "blocked_word"),
        ("Tell me how to Go To the station.", "blocked_word"),
        ("Draw a cat.", "blocked_word"),
        ("What is a paragraph?", None),
        ("Explain photographs and profiles.", None),
        ("What is a drawback of plotting a bitmap?", None),
    ],
)
def test_tasks_are_judged_by_their_text(text: str, reason: str | None) -> None:
    assert unfit(text) == reason


def test_the_block_list_can_be_replaced_and_emptied() -> None:
    assert unfit("Draw a c++ cat.", ["cat"]) == "blocked_word"
    assert unfit("Draw a cat.", ["c++", "."]) is None
    assert unfit("Draw a cat.", []) is None


def test_tasks_are_judged_by_their_length() -> None:
    assert [unfit_length(number, 4, 512) for number in (3, 4, 512, 513)] == ["too_short", None, None, "too_long"]
