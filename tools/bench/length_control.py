"""Win rates at equal lengths on real answers: by a judge whose answer is known, and by any ranker.

    python tools/bench/length_control.py candidates.jsonl.gz [--ranker pairrm --model FOLDER] [--limit N]

The file has a line of JSON per prompt: ``prompt`` and ``candidates``, each with ``model`` and ``response``; the first model is
the one that the others are judged against. The judge that is known looks at lengths alone: it takes the longer answer with
log-odds 2 tanh(d / s), d the difference and s its standard deviation, so at equal lengths each answer wins half of the time.
"""

import argparse
import gzip
import json
import math
import random
from pathlib import Path
from statistics import fmean, stdev

from aipo_hpc.length_control import length_controlled
from aipo_hpc.rankers import from_texts, load_ranker
from aipo_hpc.rankers.config import RankerConfig

SLOPE = 2.0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--ranker", default="")
    arguments.add_argument("--model", default="")
    arguments.add_argument("--limit", type=int, default=None)
    given = arguments.parse_args()
    opened = gzip.open if given.data.suffix == ".gz" else open
    with opened(given.data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][: given.limit]
    answers = {each["model"]: [] for each in rows[0]["candidates"]}
    for row in rows:
        for each in row["candidates"]:
            answers[each["model"]].append(each["response"])
    base, *others = answers
    print(f"{len(rows)} prompts, against {base} (mean length {fmean(map(len, answers[base])):.0f})")
    ranker = load_ranker(RankerConfig(ranker=given.ranker), {"ranker": given.model}) if given.ranker else None
    for other in others:
        pairs = list(zip(answers[other], answers[base], strict=True))
        differences = [len(mine) - len(theirs) for mine, theirs in pairs]
        spread, draw = stdev(differences), random.Random(other)
        verdicts = {
            "length alone": [
                float(draw.random() < 1 / (1 + math.exp(-SLOPE * math.tanh(each / spread)))) if each else 0.5
                for each in differences
            ]
        }
        if ranker is not None:
            rankings = ranker.rank(from_texts([row["prompt"] for row in rows], pairs))
            verdicts[given.ranker] = [
                0.5 + 0.5 * ((one > two) - (one < two)) for one, two in (r.scores for r in rankings)
            ]
        for judge, wins in verdicts.items():
            found = length_controlled(wins, differences)
            told = "not determined" if found is None else (
                f"{100 * found.win_rate:.1f} ± {100 * found.standard_error:.1f} %, slope {found.slope:.2f}"
            )  # fmt: skip
            print(f"{other:28} {judge:12} plain {100 * fmean(wins):.1f} %, at equal lengths {told}, mean length "
                  f"{fmean(map(len, answers[other])):.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
