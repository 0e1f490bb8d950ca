"""Which texts were seen before: the same ones, and nearly the same ones.

Texts are compared as their letters and digits in lower case. Two are nearly the same if the sets of their pieces of five
characters overlap by the threshold or more (Jaccard: size of the intersection over size of the union). Candidates come from
datasketch's MinHash LSH, so a look-up costs the same whatever was seen, and every candidate is then compared exactly: a text
is never dropped for a hash that happens to agree, and one that overlaps by just the threshold is missed now and then.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasketch import MinHash

_PIECE = 5
_PERMUTATIONS = 128
_BATCH = 1024
_WEIGHTS = (0.05, 0.95)
"""How little a superfluous candidate counts, which is compared and done with, against one that is missed."""


@dataclass(frozen=True)
class Match:
    """What a text repeats: the group in which that was remembered, and whether it is the very same."""

    group: str
    exact: bool


class Seen:
    """The texts that were seen, by group. With ``threshold`` 1, only the very same text is a repetition."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._texts: list[str] = []
        self._groups: list[str] = []
        self._exact: dict[str, int] = {}
        self._index = None
        if threshold < 1:
            from datasketch import MinHashLSH

            self._index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=_WEIGHTS)

    def __len__(self) -> int:
        return len(self._texts)

    def remember(self, texts: Iterable[str], group: str) -> None:
        """Remember texts, whether or not they repeat others."""
        fresh = [text for text in dict.fromkeys(map(normalized, texts)) if text not in self._exact]
        for start in range(0, len(fresh), _BATCH):
            batch = fresh[start : start + _BATCH]
            first = len(self._texts)
            for number, text in enumerate(batch, first):
                self._exact[text] = number
                self._texts.append(text)
                self._groups.append(group)
            if self._index is not None:
                for number, sketch in enumerate(_sketches(batch), first):
                    self._index.insert(number, sketch)

    def match(self, text: str) -> Match | None:
        """What the text repeats (the first that was remembered), or None."""
        wanted = normalized(text)
        if (same := self._exact.get(wanted)) is not None:
            return Match(self._groups[same], exact=True)
        if self._index is None:
            return None
        own = pieces(wanted)
        for number in sorted(self._index.query(_sketches([wanted])[0])):
            if overlap(own, pieces(self._texts[number])) >= self._threshold:
                return Match(self._groups[number], exact=False)
        return None


def normalized(text: str) -> str:
    """The words of a text in lower case, without punctuation; a text of punctuation alone as it is."""
    words = "".join(letter if letter.isalnum() else " " for letter in text.casefold()).split()
    return " ".join(words) or text.strip()


def overlap(one: set[str], other: set[str]) -> float:
    """Jaccard similarity of two sets."""
    return len(one & other) / len(one | other)


def pieces(text: str) -> set[str]:
    """What texts are compared by; a short text is its only piece."""
    return {text[start : start + _PIECE] for start in range(max(1, len(text) - _PIECE + 1))}


def _sketches(texts: Sequence[str]) -> list["MinHash"]:
    from datasketch import MinHash

    encoded = [[piece.encode("utf-8", "surrogatepass") for piece in pieces(text)] for text in texts]
    sketches: list[MinHash] = MinHash.bulk(
        encoded, num_perm=_PERMUTATIONS, seed=1, hashfunc=zlib.crc32, scheme="affine32"
    )
    return sketches
