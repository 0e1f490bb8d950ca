"""MT-Bench: two turns, the second after the model's own first answer; a line of JSON per question.

What FastChat's llm_judge reads from data/mt_bench/model_answer/<model>.jsonl (lm-sys/FastChat, llm_judge/gen_model_answer.py
and common.py), with its temperature for each category, and 1024 tokens; top_k 50 is what transformers, and so FastChat, does
by default.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aipo_hpc.benchmarks import Answer, Question, Sampling

SAMPLING = Sampling(temperature=0.7, max_tokens=1024, max_prompt_tokens=3072)

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


def question(row: Mapping[str, Any]) -> Question:
    """Its turns, at the temperature of its category."""
    turns = row["turns"]
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise TypeError("'turns' is not a list of texts")
    return Question(str(row["question_id"]), tuple(turns), row, TEMPERATURES.get(row["category"], SAMPLING.temperature))


def answer_file(model: str) -> str:
    """Below the folder ``data`` of llm_judge."""
    return f"mt_bench/model_answer/{model}.jsonl"


def render(answers: Sequence[Answer], model: str, now: float) -> str:
    """A line per question, in the order of their numbers."""
    lines = [
        {
            "question_id": answer.question.row["question_id"],
            "answer_id": answer.identifier(model),
            "model_id": model,
            "choices": [{"index": 0, "turns": list(answer.turns)}],
            "tstamp": now,
        }
        for answer in sorted(answers, key=lambda each: int(each.question.row["question_id"]))
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)
