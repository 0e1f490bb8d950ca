"""The demo's text: what ``text.toml`` says, composed into preference pairs and into prompts.

    text.toml -> items (a question in three wordings, one good answer)
              -> corpus.jsonl    {"prompt", "chosen", "rejected"}: one or two wordings of most items
              -> prompts.jsonl   {"prompt_id", "prompt"}: wordings of the same items that the corpus does not have,
                                 and items that the corpus does not have at all

``rejected`` fails in one of six ways, in turn: curt, rude, rambling, repetitive, unfinished, off the topic.
Same text and seed, same bytes.
"""

import json
import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAILURES = ("curt", "rude", "rambling", "repetitive", "unfinished", "off-topic")
NUM_PROMPTS = 280
NEW_ITEMS = 0.1
"""The share of the items with a pattern (things, animals, jobs, notes, sums) that only prompts.jsonl has."""
SECOND_WORDING = 0.7
"""The share of the corpus' items that it asks for in two wordings."""

# fmt: off
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]
# fmt: on


@dataclass(frozen=True)
class Item:
    """A question in three wordings with its good answer; ``pattern``: other items ask the same of something else."""

    family: str
    topic: str
    prompts: tuple[str, str, str]
    answer: str
    pattern: bool


@dataclass(frozen=True)
class Pair:
    """One row of corpus.jsonl; ``failure`` (the way ``rejected`` fails) and ``bad`` stay out of the file."""

    prompt: str
    chosen: str
    rejected: str
    failure: str
    bad: tuple[str, ...]
    """One bad answer for each way of failing, ``rejected`` among them."""


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def items(world: dict[str, Any]) -> Iterator[Item]:
    """Yield every item of the world."""
    for name, what, use, place in world["things"]:
        yield Item(
            "thing", name,
            (f"What is {name}?", f"Explain what {name} is.", f"Can you tell me what {name} is?"),
            f"{capital(name)} is {what}. People use it to {use}.", True,
        )  # fmt: skip
        yield Item(
            "thing", name,
            (f"What is {name} used for?", f"What do people use {name} for?", f"Why would someone need {name}?"),
            f"{capital(name)} is used to {use}. It is {what}.", True,
        )  # fmt: skip
        yield Item(
            "thing", name,
            (f"Where would I find {name}?", f"Where do people have {name}?", f"In what place should I look for {name}?"),
            f"You will usually find {name} {place}. People use it to {use}.", True,
        )  # fmt: skip
    for name, what, food, home in world["animals"]:
        yield Item(
            "animal", name,
            (f"What is {name}?", f"Explain what {name} is.", f"Can you tell me what {name} is?"),
            f"{capital(name)} is {what}. It lives {home} and eats {food}.", True,
        )  # fmt: skip
        yield Item(
            "animal", name,
            (f"What does {name} eat?", f"Tell me what {name} eats.", f"What kind of food does {name} like?"),
            f"{capital(name)} eats {food}. It is {what}.", True,
        )  # fmt: skip
        yield Item(
            "animal", name,
            (f"Where does {name} live?", f"Tell me where {name} lives.", f"In what place is {name} at home?"),
            f"{capital(name)} lives {home}. There it finds {food} to eat.", True,
        )  # fmt: skip
    for name, does, place, needs in world["jobs"]:
        yield Item(
            "job", name,
            (f"What does {name} do?", f"Describe the work of {name}.", f"Can you tell me what {name} does?"),
            f"{capital(name)} {does}. The work is done {place} and takes {needs}.", True,
        )  # fmt: skip
        yield Item(
            "job", name,
            (f"Where does {name} work?", f"Tell me where {name} works.", f"In what place does {name} work?"),
            f"{capital(name)} works {place}. This person {does}, which takes {needs}.", True,
        )  # fmt: skip
        yield Item(
            "job", name,
            (f"What does {name} need?", f"Tell me what {name} needs.", f"What should {name} bring to the job?"),
            f"{capital(name)} needs {needs}. This person {does} and works {place}.", True,
        )  # fmt: skip
    for group, first, second, third, about in world["lists"]:
        yield Item(
            "list", group,
            (f"Name three {group}.", f"Give me a list of three {group}.", f"Can you think of three {group}?"),
            f"Three {group} are {first}, {second} and {third}. {about}", False,
        )  # fmt: skip
    for task, first, second, last in world["howtos"]:
        yield Item(
            "how to", f"how to {task}",
            (f"How do I {task}?", f"Tell me how to {task}.", f"What is the best way to {task}?"),
            f"First, {first}. Then {second}. Finally, {last}.", False,
        )  # fmt: skip
    for blunt, answer in world["polite"]:
        yield Item(
            "polite", "being polite",
            (f"Make this more polite: {blunt}", f"Say this in a friendlier way: {blunt}", f"Rewrite this politely: {blunt}"),
            answer, False,
        )  # fmt: skip
    for word, opposite, example in world["opposites"]:
        yield Item(
            "opposite", f"the word {word}",
            (f"What is the opposite of {word}?", f"Name the opposite of {word}.", f"Which word is the opposite of {word}?"),
            f"The opposite of {word} is {opposite}. For example, {example}.", False,
        )  # fmt: skip
    for problem, topic, answer in world["advice"]:
        yield Item(
            "advice", topic,
            (f"{problem}. What can I do?", f"{problem}. Do you have any advice?", f"{problem}. Can you help me?"),
            answer, False,
        )  # fmt: skip
    yield from notes(world["notes"])
    yield from sums(world["sums"]["counted"])


def notes(world: dict[str, Any]) -> Iterator[Item]:
    """Yield the items that ask for a note to someone."""
    for person in world["people"]:
        dear = f"Dear {person.removeprefix('my ')}"
        for gift, about in world["thanks"]:
            yield Item(
                "note", f"a note to {person}",
                (
                    f"Write a short thank you note to {person} for {gift}.",
                    f"Thank {person} for {gift} in a few words.",
                    f"I want to thank {person} for {gift}. What should I write?",
                ),
                f"{dear}, thank you so much for {gift}. {about}. Warm wishes and see you soon.", True,
            )  # fmt: skip
        for state, wish in world["greetings"]:
            said = wish if wish.startswith("I ") else wish[0].lower() + wish[1:]
            yield Item(
                "note", f"a note to {person}",
                (
                    f"Write a short note to {person}, who {state}.",
                    f"What should I write to {person}, who {state}?",
                    f"Send a few kind words to {person}, who {state}.",
                ),
                f"{dear}, {said}. Warm wishes and see you soon.", True,
            )  # fmt: skip


def sums(counted: list[str]) -> Iterator[Item]:
    """Yield additions and subtractions of small numbers, in words."""
    for a in range(2, 10):
        for b in range(2, 10):
            if (a * 3 + b) % 3 == 0 and b <= a + 3:
                first, second, total = NUMBERS[a], NUMBERS[b], NUMBERS[a + b]
                what = counted[(a + b) % len(counted)]
                yield Item(
                    "sum", f"{first} and {second}",
                    (f"What is {first} plus {second}?", f"How much is {first} plus {second}?", f"Add {first} and {second}."),
                    f"{capital(first)} plus {second} is {total}. "
                    f"If you have {first} {what} and get {second} more, you have {total} {what}.", True,
                )  # fmt: skip
            if a > b and (a + b) % 3 == 0:
                first, second, rest = NUMBERS[a], NUMBERS[b], NUMBERS[a - b]
                what = counted[(a + b) % len(counted)]
                left = f"{rest} {what[:-1] if a - b == 1 else what}"
                yield Item(
                    "sum", f"{first} and {second}",
                    (f"What is {first} minus {second}?", f"How much is {first} minus {second}?", f"Take {second} away from {first}."),
                    f"{capital(first)} minus {second} is {rest}. "
                    f"If you have {first} {what} and give away {second}, you keep {left}.", True,
                )  # fmt: skip


def spoil(item: Item, failure: str, everything: list[Item], bad: dict[str, list[str]], rng: random.Random) -> str:
    """An answer to the item that fails in the given way."""
    fill = {"topic": item.topic, "Topic": capital(item.topic)}
    if failure in ("curt", "rude"):
        return rng.choice(bad[failure]).format(**fill)
    if failure == "rambling":
        middle = rng.sample(bad["ramble_middle"], 3)
        return ", ".join([rng.choice(bad["ramble_start"]).format(**fill), *middle, rng.choice(bad["ramble_end"])])
    if failure == "repetitive":
        first, second = rng.sample(bad["repeat"], 2)
        return " ".join([first, first, second, first, second][: rng.randint(3, 5)]).format(**fill)
    if failure == "unfinished":
        words = item.answer.split()
        return " ".join(words[: rng.randint(3, max(4, len(words) // 2))]).rstrip(".,")
    other = rng.choice([other for other in everything if other.family != item.family])
    return f"{rng.choice(bad['aside'])} {other.answer}" if rng.random() < 0.5 else other.answer


def compose(text: Path, seed: int) -> tuple[list[Pair], list[str]]:
    """The corpus' pairs and the prompts of the demo."""
    rng = random.Random(seed)
    world = tomllib.loads(text.read_text(encoding="utf-8"))
    everything = list(items(world))
    new = [item for item in everything if item.pattern and rng.random() < NEW_ITEMS]
    pairs, fresh, turn = [], [], rng.sample(FAILURES, len(FAILURES))
    for item in everything:
        wordings = rng.sample(item.prompts, 3)
        fresh.append((item in new, wordings[0]))
        if item in new:
            continue
        for prompt in wordings[1:] if rng.random() < SECOND_WORDING else wordings[1:2]:
            failure = turn[len(pairs) % len(turn)]
            bad = {how: spoil(item, how, everything, world["bad"], rng) for how in FAILURES}
            pairs.append(Pair(prompt, item.answer, bad[failure], failure, tuple(bad.values())))
    unseen = [prompt for is_new, prompt in fresh if is_new]
    reworded = rng.sample([prompt for is_new, prompt in fresh if not is_new], NUM_PROMPTS - len(unseen))
    prompts = unseen + reworded
    rng.shuffle(prompts)
    rng.shuffle(pairs)
    assert len(set(prompts)) == len(prompts) and not set(prompts) & {pair.prompt for pair in pairs}
    return pairs, prompts


def write(folder: Path, pairs: list[Pair], prompts: list[str]) -> None:
    """Write corpus.jsonl and prompts.jsonl."""
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    _write_lines(folder / "corpus.jsonl", rows)
    _write_lines(
        folder / "prompts.jsonl",
        [{"prompt_id": f"demo-{number:03d}", "prompt": prompt} for number, prompt in enumerate(prompts)],
    )


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
