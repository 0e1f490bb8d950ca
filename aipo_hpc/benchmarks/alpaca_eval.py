"""AlpacaEval 2: one JSON list of ``instruction``, ``output``, ``generator``, ``dataset``.

What ``alpaca_eval --model_outputs`` reads (tatsu-lab/alpaca_eval; its results/<model>/model_outputs.json). Sampling is that of
its configuration of zephyr-7b-beta, which AIPO used for all of its models: temperature 0.7, top_k 50, 2048 tokens.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aipo_hpc.benchmarks import Answer, Question, Sampling

SAMPLING = Sampling(temperature=0.7, max_tokens=2048, max_prompt_tokens=2048)


def question(row: Mapping[str, Any]) -> Question:
    """The instruction; answers of a reference model that are in the row are left out of what is kept."""
    instruction = row["instruction"]
    if not isinstance(instruction, str):
        raise TypeError("'instruction' is not a text")
    kept = {key: value for key, value in row.items() if key not in ("output", "generator")}
    return Question(instruction, (instruction,), kept)


def answer_file(model: str) -> str:
    """One folder per model, as in the results of its repository."""
    return f"alpaca_eval/results/{model}/model_outputs.json"


def render(answers: Sequence[Answer], model: str, now: float) -> str:
    """The list, in the order of the questions."""
    rows = [{**answer.question.row, "output": answer.turns[0], "generator": model} for answer in answers]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
