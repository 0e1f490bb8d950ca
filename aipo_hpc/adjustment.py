"""What is asked for differently than the recipe says when a shard is tried again after a failure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Adjustment:
    """What is asked for differently than the recipe says when a shard is tried again; never part of its content."""

    memory: float = 1.0
    """Times the memory."""
    time: float = 1.0
    """Times the wall time."""
    batch: int = 1
    """Divisor of the batch sizes that do not change results."""
    exclude: tuple[str, ...] = ()
    """Nodes to keep off."""

    def __str__(self) -> str:
        """In few words, empty if nothing is different."""
        words = [
            f"{self.memory:g} x the memory" if self.memory != 1 else "",
            f"{self.time:g} x the time" if self.time != 1 else "",
            f"1/{self.batch} of the batch" if self.batch != 1 else "",
            f"not on {', '.join(self.exclude)}" if self.exclude else "",
        ]
        return ", ".join(filter(None, words))


AS_ASKED = Adjustment()


def keeping_off(adjustment: Adjustment, nodes: Iterable[str]) -> Adjustment:
    """The adjustment that also keeps off these nodes."""
    return replace(adjustment, exclude=tuple(sorted({*adjustment.exclude, *nodes})))
