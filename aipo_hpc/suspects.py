"""Prompts that may kill their worker (a crash in a kernel, no memory left), isolated by halving and set aside.

    <attempt>/in-flight.jsonl   a prompt's id per line, written when it is begun
    <attempt>/progress.jsonl    rows of finished ones, by their first field

An attempt that died had some prompts in flight. Those that were in flight at two deaths are suspects: they are begun after all
others, half of them at a time, and where a half dies again it is halved again. A prompt that killed its worker twice while
nothing else was in flight is set aside, with an error in its row, and the shard goes on without it. One death alone changes
nothing, so a task that was merely killed repeats its batches as they were.
"""

import json
from collections import Counter
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aipo_hpc.durable import full_disk_named
from aipo_hpc.errors import DataError
from aipo_hpc.progress import PROGRESS
from aipo_hpc.task import Task

IN_FLIGHT = "in-flight.jsonl"
ALONE = 2
"""Deaths of a prompt that was in flight alone after which it is set aside."""
_FEW = 4
"""So many prompts of a shard may be set aside; more deaths than that are not the prompts' fault."""


@dataclass(frozen=True)
class Suspicion:
    """What the deaths of a shard's attempts say: ``groups`` to be begun each by itself, and ``guilty`` prompts."""

    groups: tuple[tuple[str, ...], ...] = ()
    guilty: tuple[str, ...] = ()


def narrow(flights: Sequence[Sequence[str]]) -> Suspicion:
    """What follows from the prompts that were in flight at each death, oldest first."""
    groups: list[tuple[str, ...]] = []
    guilty: list[str] = []
    unexplained: list[Sequence[str]] = []
    alone: Counter[str] = Counter()
    for flight in flights:
        group = next((group for group in groups if flight and set(flight) <= set(group)), None)
        if len(flight) == 1:
            alone[flight[0]] += 1
            if alone[flight[0]] >= ALONE and flight[0] not in guilty:
                guilty.append(flight[0])
        if group is not None:
            at = groups.index(group)
            groups[at : at + 1] = _halves([each for each in flight if each not in guilty])
            continue
        twice = next((both for earlier in reversed(unexplained) if (both := _both(flight, earlier, groups))), None)
        if twice is None:
            unexplained.append(flight)
        else:
            groups += _halves([each for each in twice if each not in guilty])
    return Suspicion(tuple(groups), tuple(guilty))


def _both(flight: Sequence[str], earlier: Sequence[str], groups: Sequence[Sequence[str]]) -> list[str]:
    suspected = {each for group in groups for each in group}
    return [each for each in flight if each in set(earlier) and each not in suspected]


def _halves(prompts: Sequence[str]) -> list[tuple[str, ...]]:
    middle = (len(prompts) + 1) // 2
    return [half for half in (tuple(prompts[:middle]), tuple(prompts[middle:])) if half]


def in_flight(attempt: Path) -> list[str]:
    """The prompts that an attempt had begun and not finished."""
    ended = [next(iter(row.values()), None) for row in _lines(attempt / PROGRESS) if isinstance(row, dict)]
    begun = (note for note in _lines(attempt / IN_FLIGHT) if isinstance(note, str))
    return [each for each in dict.fromkeys(begun) if each not in ended]


def _lines(path: Path) -> list[object]:
    found: list[object] = []
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError):
                    found.append(json.loads(line))
    return found


class Suspects:
    """What an attempt does about the deaths of those before it, and its own note of what is in flight."""

    def __init__(self, task: Task) -> None:
        """Raises DataError if so many prompts were set aside that it cannot be their fault."""
        flights = [in_flight(attempt) for attempt in task.deaths]
        self._suspicion = narrow(flights)
        self._path = task.out / IN_FLIGHT
        with full_disk_named(self._path):
            self._path.write_text("")
        if flights and self._suspicion != narrow(flights[:-1]):
            task.advance()
        for prompt_id in self.guilty:
            print(f"{task.job} shard {task.shard}: prompt {prompt_id} is set aside, {self.reason}", flush=True)
        if len(self.guilty) > _FEW:
            raise DataError(
                f"{task.job} shard {task.shard}: {len(self.guilty)} prompts ({', '.join(self.guilty[:3])}, ...) each killed "
                "their worker while they were alone in flight, so it is not the prompts. Read the end of the shard's logs, "
                "mend what kills the workers, then launch again."
            )

    reason = f"it killed its worker {ALONE} times while nothing else was in flight"

    @property
    def guilty(self) -> tuple[str, ...]:
        """The prompts that are set aside."""
        return self._suspicion.guilty

    @property
    def counts(self) -> dict[str, float]:
        """What a sentinel tells of it."""
        return {"set_aside": len(self.guilty)} if self.guilty else {}

    def rounds(self, batches: Sequence[Sequence[str]], finished: Container[str]) -> list[list[list[str]]]:
        """The batches that are not finished, as rounds to be begun one after the other: suspects last, each group alone."""
        usual = self.usual(batches, finished)
        return [*([usual] if usual else []), *([group] for group in self.groups(batches, finished))]

    def usual(self, batches: Sequence[Sequence[str]], finished: Container[str]) -> list[list[str]]:
        """The batches that are not finished, without suspects.

        A batch without a suspect keeps its composition, finished prompts included.
        """
        suspected = {*self.guilty, *(each for group in self._suspicion.groups for each in group)}
        cleared = [[each for each in batch if each not in suspected] for batch in batches]
        return [batch for batch in cleared if any(each not in finished for each in batch)]

    def groups(self, batches: Sequence[Sequence[str]], finished: Container[str]) -> list[list[str]]:
        """The groups of suspects in these batches that are not finished, each to be begun alone."""
        known = {each for batch in batches for each in batch}
        groups = [
            [each for each in group if each in known and each not in finished] for group in self._suspicion.groups
        ]
        return [group for group in groups if group]

    def begin(self, prompt_ids: Sequence[str]) -> None:
        """Note that these are in flight from now on."""
        with full_disk_named(self._path), self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(each) + "\n" for each in prompt_ids)
