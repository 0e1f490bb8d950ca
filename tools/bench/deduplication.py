"""Measure finding repetitions: a pool of prompts is remembered, then new ones are looked up one after the other.

    python tools/bench/deduplication.py [--pool 6400] [--new 2000]

Prompts are drawn from the words and lengths of natural text (Zipf's law); every fourth new one is a prompt of the pool with a
tenth of its words changed. Prints CPU seconds, and how many of those were found of all that overlap by the threshold or more.
"""

import argparse
import random
import resource
import time
from itertools import accumulate

from aipo_hpc.deduplication import Seen, normalized, overlap, pieces

THRESHOLD = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=6400)
    parser.add_argument("--new", type=int, default=2000)
    arguments = parser.parse_args()
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(2, 9))) for _ in range(30_000)]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def prompt() -> list[str]:
        return draw.choices(words, cum_weights=weights, k=min(400, max(6, int(draw.lognormvariate(4, 1)))))

    pool = [prompt() for _ in range(arguments.pool)]
    new: list[str] = []
    near: set[int] = set()
    for number in range(arguments.new):
        if number % 4:
            new.append(" ".join(prompt()))
            continue
        source = draw.choice(pool)
        text = list(source)
        for place in draw.sample(range(len(text)), max(1, len(text) // 10)):
            text[place] = draw.choice(words)
        new.append(" ".join(text))
        if overlap(*(pieces(normalized(" ".join(each))) for each in (source, text))) >= THRESHOLD:
            near.add(number)
    seen = Seen(THRESHOLD)
    started = time.process_time()
    seen.remember((" ".join(text) for text in pool), "pool")
    remembered = time.process_time()
    found: set[int] = set()
    for number, one in enumerate(new):
        if seen.match(one) is None:
            seen.remember([one], "new")
        else:
            found.add(number)
    ended = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{arguments.new} new prompts against {arguments.pool}: {ended - started:.1f} s of CPU "
        f"({remembered - started:.1f} s to remember the pool), found {len(found & near)} of the {len(near)} that "
        f"repeat the pool, and {len(found - near)} others that repeat something; "
        f"{peak:.2f} GiB at most"
    )


if __name__ == "__main__":
    main()
