"""How many shards may be sent at once, learnt from a scheduler that limits how many jobs a user may have.

Such limits belong to accounts and qualities of service and cannot be asked for everywhere. So all is sent until it is
refused; then half of it, down to one. When even one is refused, or what was accepted has filled the room, nothing is sent for
a while. What is accepted doubles it again.
"""

from collections.abc import Iterable


class Allowance:
    """Grows and shrinks with the scheduler's answers. ``wait``: seconds to leave a full scheduler alone.

    ``answers``: earlier ones, numbers of shards with whether there was room for them, so that nothing is learnt twice.
    """

    def __init__(self, wait: float, answers: Iterable[tuple[int, bool]] = ()) -> None:
        self._wait = wait
        self._most: int | None = None
        self._not_before = 0.0
        self._accepted = False
        for num_shards, taken in answers:
            if taken:
                self.accepted(num_shards)
            else:
                self.refused(num_shards, now=0.0)

    def at(self, now: float) -> int | None:
        """How many shards to send now; None: as many as there are."""
        return 0 if now < self._not_before else self._most

    def refused(self, num_shards: int, now: float) -> None:
        """So many were too many."""
        self._most = max(1, num_shards // 2)
        if num_shards == 1 or self._accepted:
            # Not even one, or what has just been accepted filled the room.
            self._not_before = now + self._wait
        self._accepted = False

    def accepted(self, num_shards: int) -> None:
        """So many were taken."""
        if self._most is not None:
            self._accepted = True
            self._most = max(self._most, 2 * num_shards)
