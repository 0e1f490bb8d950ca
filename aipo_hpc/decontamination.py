"""Benchmark prompts kept out of training: which training prompts hold so much of one that it was seen.

Texts are compared as lower-case words. A training prompt is contaminated if the n-grams (n words in a row) that it shares with
a benchmark prompt cover at least a given share of that prompt's words, as Tulu 3 measures it (Lambert et al. 2024,
arXiv 2411.15124: 8-grams, half of the words). Benchmark prompts of fewer than n words count if they are the whole text.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aipo_hpc.errors import DataError

COLUMNS = ("prompt", "instruction", "question", "text")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Match:
    """A benchmark prompt that a text holds: where it is from, how much of it is there."""

    source: str
    overlap: float


class Benchmarks:
    """Benchmark prompts, ready to be looked for. ``prompts`` maps where each is from to its text."""

    def __init__(self, prompts: Mapping[str, str], ngram: int = 8, overlap: float = 0.5) -> None:
        self._ngram = ngram
        self._overlap = overlap
        self._sources = list(prompts)
        self._lengths: list[int] = []
        self._places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        self._short: dict[tuple[str, ...], int] = {}
        for number, text in enumerate(prompts.values()):
            found = words(text)
            self._lengths.append(len(found))
            if 0 < len(found) < ngram:
                self._short.setdefault(tuple(found), number)
            for start, gram in enumerate(_ngrams(found, ngram)):
                self._places[gram].append((number, start))

    def match(self, text: str) -> Match | None:
        """The benchmark prompt that most of is in ``text`` (the first of equals), if it is enough."""
        found = words(text)
        if (number := self._short.get(tuple(found))) is not None:
            return Match(self._sources[number], 1.0)
        covered: dict[int, set[int]] = defaultdict(set)
        for gram in set(_ngrams(found, self._ngram)):
            for number, start in self._places.get(gram, ()):
                covered[number].update(range(start, start + self._ngram))
        shares = {number: len(places) / self._lengths[number] for number, places in covered.items()}
        if not shares:
            return None
        most = min(shares, key=lambda number: (-shares[number], number))
        return Match(self._sources[most], shares[most]) if shares[most] >= self._overlap else None


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def benchmark_texts(rows: Iterable[tuple[str, Mapping[str, Any]]], source: str) -> Iterator[tuple[str, str]]:
    """Where each prompt of a benchmark file is from, and its text; every turn counts as a prompt.

    Raises DataError for a row that has none of the known columns.
    """
    for number, (where, row) in enumerate(rows, 1):
        turns = row.get("turns") or row.get("messages") or [row[name] for name in COLUMNS if row.get(name)][:1]
        found = [turn.get("content") if isinstance(turn, Mapping) else turn for turn in turns]
        texts = [text for text in found if isinstance(text, str)]
        if not texts or len(texts) < len(found):
            raise DataError(
                f"{where}: no prompt in it; a row of a benchmark has one of {', '.join(COLUMNS)}, or turns or messages. "
                "Mend it or take it out of pairs.decontaminate."
            )
        for turn, text in enumerate(texts, 1):
            yield f"{source} row {number}" + (f" turn {turn}" if len(texts) > 1 else ""), text


def _ngrams(found: list[str], n: int) -> Iterator[tuple[str, ...]]:
    for start in range(len(found) - n + 1):
        yield tuple(found[start : start + n])
