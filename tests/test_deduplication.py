"""What counts as seen before, and that nothing is dropped or kept by an accident of hashing."""

import random

from aipo_hpc.deduplication import Match, Seen, normalized, overlap

LONG = "Explain in three sentences why the sky over the sea looks blue at noon and red when the sun goes down."


def seen(threshold: float = 0.7) -> Seen:
    made = Seen(threshold)
    made.remember([LONG, "What is a river?"], "pool")
    return made


def test_the_same_words_are_the_same_whatever_their_case_punctuation_and_spaces() -> None:
    assert normalized("  What's a\n River?!") == "what s a river"
    assert seen().match("what is a RIVER") == Match("pool", exact=True)
    assert seen(1).match("what is a RIVER") == Match("pool", exact=True)


def test_nearly_the_same_is_found_unless_only_the_same_is_asked_for() -> None:
    near = LONG.replace("three", "four")
    assert seen().match(near) == Match("pool", exact=False)
    assert seen(1).match(near) is None
    assert seen().match("Explain why bread needs salt, and how much of it.") is None


def test_texts_without_letters_and_of_any_script_are_told_apart() -> None:
    made = Seen(0.7)
    made.remember(["???", "写一首关于春天的诗，不要超过四行。", "🙂"], "pool")
    assert made.match("??? ") == Match("pool", exact=True)
    assert made.match("!!!") is None
    assert made.match("写一首关于春天的诗，不要超过四行") == Match("pool", exact=True)
    assert made.match("🙂 ") == Match("pool", exact=True)
    assert made.match("\ud83d") is None, "a lone surrogate hurts nobody"
    assert made.match("") is None


def test_the_group_is_that_of_the_first_text_that_is_repeated() -> None:
    made = seen()
    made.remember([LONG, "Name a bird."], "new")
    assert made.match(LONG) == Match("pool", exact=True)
    assert made.match("name a bird") == Match("new", exact=True)
    assert len(made) == 3


def test_what_is_found_agrees_with_comparing_every_pair() -> None:
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(400)]
    pool = [" ".join(draw.choices(words, k=draw.randint(4, 40))) for _ in range(300)]

    def pieces(text: str) -> set[str]:
        return {text[start : start + 5] for start in range(max(1, len(text) - 4))}

    made = Seen(0.7)
    made.remember(pool, "pool")
    missed = wrong = expected = 0
    for text in pool:
        changed = text.split()
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.choice(words)
        asked = " ".join(changed)
        best = max(overlap(pieces(asked), pieces(other)) for other in pool)
        found = made.match(asked) is not None
        expected += best >= 0.7
        missed += best >= 0.7 and not found
        wrong += best < 0.7 and found
    print(f"{expected} of 300 texts repeat one of 300; {missed} missed, {wrong} wrongly found")
    assert wrong == 0
    assert 50 < expected < 250
    assert missed <= 0.05 * expected
