"""Does faults at random moments while a user retypes the launch command, and mends what administrators would mend."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from _chaos.faults import FAULTS
from _chaos.user import HumanNeededError
from _chaos.world import World


@dataclass
class Gremlin:
    """Kinds come in a seeded order, each once before any that is possible comes again; the pauses between them are seeded, too.

    What is not possible when its turn has come is done as soon as it is, between two others; its place is kept for it.

    What they hit depends on where the run is just then, so a seed repeats the plan of an attack and not each hit.
    """

    world: World
    seed: int
    pause: tuple[float, float] = (3.0, 8.0)
    most: int = 20
    """Faults at most; the run is then left alone to finish."""
    kinds: Sequence[str] = tuple(FAULTS)
    tell: Callable[[str], None] = print
    injected: Counter[str] = field(default_factory=Counter)
    _overdue: list[str] = field(default_factory=list)
    _not_before: float = 0.0
    """When something may be done again."""
    _ends: list[tuple[float, Callable[[], object]]] = field(default_factory=list)

    def disturb(self, seconds: float) -> None:
        """Disturb until the run is finished. Raises HumanNeededError if it is not after the time, or will never be."""
        draw = Random(self.seed)
        deck: list[str] = []
        began = time.monotonic()
        look_again, due = began, began + draw.uniform(*self.pause)
        try:
            while True:
                self.world.user.attend(self.world)
                now = time.monotonic()
                if now - began > seconds:
                    raise HumanNeededError(f"not finished after {seconds:g} s; see {self.world.user.log}")
                self._end_what_is_over(now)
                if self.world.user.finished and not self._ends:
                    return
                left = 0 if self.world.user.finished else self.most - self.injected.total()
                if left and now >= self._not_before:
                    ready = now >= due and left > len(self._overdue)
                    if ready and not deck:
                        deck = draw.sample(rest := sorted(set(self.kinds) - set(self._overdue)), len(rest))
                    if ready and self._inject(deck, draw, now - began):
                        due = time.monotonic() + draw.uniform(*self.pause)
                    elif now >= look_again:
                        done = self._inject(self._overdue, draw, now - began)
                        look_again = time.monotonic() + (draw.uniform(*self.pause) if done else 0.5)
                time.sleep(0.1)
        finally:
            self._end_what_is_over(float("inf"))
            self.world.user.kill()

    def _inject(self, kinds: list[str], draw: Random, at: float) -> bool:
        """Do the first of the kinds that is possible now, and take it off; those before it are overdue. False if none was."""
        for kind in list(kinds):
            kinds.remove(kind)
            done = FAULTS[kind](self.world, draw)
            if done is None:
                self._overdue.append(kind)
                continue
            self.injected[kind] += 1
            self.tell(f"[{at:6.1f} s] {done.what}")
            self._not_before = time.monotonic() + done.alone
            if done.end is not None:
                self._ends.append((time.monotonic() + done.seconds, done.end))
            return True
        return False

    def _end_what_is_over(self, now: float) -> None:
        for due, end in list(self._ends):
            if due <= now:
                end()
                self._ends.remove((due, end))
