"""Arena-Hard v0.1: one turn, greedy, 4096 tokens; a line of JSON per question.

The questions of v0.1 were published in two forms, each with a tool that reads answers of its own form; the form of the
questions decides (lmarena/arena-hard-auto, gen_answer.py, gen_judgment.py and show_result.py of either time):

    2024   question_id, turns: [{content}]   ->   question_id, answer_id, model_id, choices: [{turns: [{content, token_len}]}]
    2025   uid, prompt                       ->   uid, ans_id, model, messages: [user, assistant: {content: {answer}}]

``token_len`` is in the model's own tokens; the tool's would be tiktoken's, which are fetched from the network. It is shown as
the average number of tokens. Controlling for style compares with such lengths: run the tool's own add_markdown_info.py first.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aipo_hpc.benchmarks import Answer, Question, Sampling

SAMPLING = Sampling(temperature=0.0, max_tokens=4096, max_prompt_tokens=4096)


def question(row: Mapping[str, Any]) -> Question:
    """The prompt, in either form."""
    if "uid" in row:
        turns: tuple[Any, ...] = (row["prompt"],)
    else:
        turns = tuple(turn["content"] for turn in row["turns"])
    if len(turns) != 1 or not isinstance(turns[0], str):
        raise TypeError("a question is one text")
    return Question(str(row["uid"] if "uid" in row else row["question_id"]), turns, row)


def answer_file(model: str) -> str:
    """Below the folder ``data`` of the tool."""
    return f"arena-hard-v0.1/model_answer/{model}.jsonl"


def render(answers: Sequence[Answer], model: str, now: float) -> str:
    """A line per question, in the order of their names, as the tool itself sorts them."""
    ordered = sorted(answers, key=lambda each: each.question.question_id)
    return "".join(json.dumps(_line(answer, model, now)) + "\n" for answer in ordered)


def _line(answer: Answer, model: str, now: float) -> dict[str, Any]:
    row, name = answer.question.row, answer.identifier(model)
    if "uid" in row:
        asked = {"role": "user", "content": row["prompt"]}
        given = {"role": "assistant", "content": {"answer": answer.turns[0]}}
        metadata = {"token_len": answer.num_tokens[0]}
        return {
            "uid": row["uid"], "ans_id": name, "model": model, "messages": [asked, given], "tstamp": now,
            "metadata": metadata,
        }  # fmt: skip
    turn = {"content": answer.turns[0], "token_len": answer.num_tokens[0]}
    return {
        "question_id": row["question_id"], "answer_id": name, "model_id": model,
        "choices": [{"index": 0, "turns": [turn]}], "tstamp": now,
    }  # fmt: skip
