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
    _ends: list[tuple[float, Callable[[], object]]] = field(default_factory=list)

    def disturb(self, seconds: float) -> None:
        """Disturb until the run is finished. Raises HumanNeededError if it is not after the time, or will never be."""
        draw = Random(self.seed)
        deck: list[str] = []
        began = time.monotonic()
        due = began + draw.uniform(*self.pause)
        try:
            while True:
                self.world.user.attend(self.world)
                now = time.monotonic()
                if now - began > seconds:
                    raise HumanNeededError(f"not finished after {seconds:g} s; see {self.world.user.log}")
                self._end_what_is_over(now)
                if self.world.user.finished and not self._ends:
                    return
                if now >= due and not self.world.user.finished and self.injected.total() < self.most:
                    if not self._inject(deck, draw, now - began):
                        # What is left is not possible now: it stays on top of the next deck.
                        deck += draw.sample(others := sorted(set(self.kinds) - set(deck)), len(others))
                    else:
                        due = time.monotonic() + draw.uniform(*self.pause)
                time.sleep(0.1)
        finally:
            self._end_what_is_over(float("inf"))
            self.world.user.kill()

    def _inject(self, deck: list[str], draw: Random, at: float) -> bool:
        """Do the first fault of the deck that is possible now; the others stay for later. False if none was."""
        for kind in list(deck):
            done = FAULTS[kind](self.world, draw)
            if done is None:
                continue
            deck.remove(kind)
            self.injected[kind] += 1
            self.tell(f"[{at:6.1f} s] {done.what}")
            if done.end is not None:
                self._ends.append((time.monotonic() + done.seconds, done.end))
            return True
        return False

    def _end_what_is_over(self, now: float) -> None:
        for due, end in list(self._ends):
            if due <= now:
                end()
                self._ends.remove((due, end))
