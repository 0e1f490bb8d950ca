"""Self-instruct's text: how seeds are put to the model, and which of the tasks that it writes are good for a prompt.

The form and the rules are those of Shen et al. 2024 (arXiv 2409.08845), after Wang et al. 2022 (Self-Instruct, arXiv
2212.10560). A task keeps its own letters: only its first is made a capital. What follows "Answer:" and the like is cut away
where that stands as a word of its own: "data:" ends in "a:" and stays whole.
"""

import re
import string
from collections.abc import Sequence

HEADER = "Come up with a series of tasks:"

BLOCKED_WORDS = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot", "go to",
)  # fmt: skip
"""What a language model cannot see, open, draw or visit."""

_NUMBER = re.compile(r"\n\s*\d+\s?\.(?=\s|$)")
_STARTS = {
    "write a program": "write_a_program",
    "detailed instructions:": "detailed_instructions",
    "task definition:": "task_definition",
}
_ANSWER = re.compile(r"(?<!\w)(?:answer|output|solution|a):", re.IGNORECASE)
_EXAMPLE = re.compile(r"(?<!\w)example:", re.IGNORECASE)


def request_text(seeds: Sequence[str]) -> str:
    """What the model is to continue: a numbered list of the seeds that breaks off at the next number."""
    lines = [f"{number}. {one_line(seed).rstrip(':')}" for number, seed in enumerate(seeds, 1)]
    return "\n".join([f"{HEADER}\n", *lines, f"{len(seeds) + 1}."])


def stop_text(num_seeds: int, tasks_per_call: int) -> str:
    """Where a continuation has as many tasks as are wanted: at the number after them."""
    return f"\n{num_seeds + tasks_per_call + 1}."


def tasks_of(continuation: str) -> list[str]:
    """The tasks of a continuation, each on one line; a list that ends with a bare number has nothing there."""
    tasks = [one_line(part) for part in _NUMBER.split(continuation)]
    return tasks if len(tasks) == 1 or tasks[-1] else tasks[:-1]


def one_line(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(text.split())


def capitalized(text: str) -> str:
    """The text with a capital first letter and all others as they are."""
    return text[:1].upper() + text[1:]


def without_answer(text: str) -> str:
    """The text up to where an answer begins, unless it shows an example, which has answers of its own."""
    found = _ANSWER.search(text)
    return text if found is None or _EXAMPLE.search(text) else text[: found.start()].strip()


def unfit(text: str, blocked_words: Sequence[str] = BLOCKED_WORDS) -> str | None:
    """Why a task is no good by its text, or None."""
    if not text:
        return "empty"
    for start, reason in _STARTS.items():
        if text.lower().startswith(start):
            return reason
    if text[0] in string.punctuation:
        return "punctuation_first"
    if not text[0].isascii():
        return "not_ascii_first"
    words = "|".join(re.escape(word) for word in blocked_words)
    if words and re.search(rf"\b(?:{words})\b", text, re.IGNORECASE):
        return "blocked_word"
    return None


def unfit_length(num_tokens: int, shortest: int, longest: int) -> str | None:
    """Why a task of so many tokens is no good, or None."""
    if num_tokens < shortest:
        return "too_short"
    return "too_long" if num_tokens > longest else None
