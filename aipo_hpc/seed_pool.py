"""The seeds of a call: which prompts self-instruct shows to the model.

Drawn anew for every call, without repetition, from the pool: from one cluster of it at a time where it is clustered, the
clusters of the shard in turn. Some may be prompts that earlier iterations made. What is drawn depends on the call's own seed
alone, so any call can be made at any time, and again.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aipo_hpc.rows import Prompt


@dataclass(frozen=True)
class Seeds:
    """What a call shows; ``cluster`` is the number of the cluster they are from, -1 without clusters."""

    prompts: list[Prompt]
    cluster: int


class SeedPool:
    """The prompts to draw from, for one shard. ``fits`` tells whether a text is short enough to be a seed."""

    def __init__(
        self,
        pool: Sequence[Prompt],
        made: Sequence[Prompt],
        clusters: dict[int, list[Prompt]],
        fits: Callable[[str], bool],
    ) -> None:
        self._pool = pool
        self._made = made
        self._clusters = clusters
        self._numbers = sorted(clusters)
        self._fits = fits

    def cluster(self, call: int) -> int:
        """The cluster of a call, -1 without clusters."""
        return self._numbers[call % len(self._numbers)] if self._numbers else -1

    def draw(self, call: int, seed: int, num_seeds: int, num_machine_seeds: int) -> Seeds:
        """The seeds of a call in the order in which they are shown; fewer where the pool has no more that fit.

        A cluster that is too small is topped up from the whole pool, and so are machine-made seeds before there are any.
        """
        randomness = random.Random(seed)
        cluster = self.cluster(call)
        drawn = self._take(self._made, num_machine_seeds, [], randomness)
        drawn = self._take(self._clusters.get(cluster, []), num_seeds, drawn, randomness)
        drawn = self._take(self._pool, num_seeds, drawn, randomness)
        randomness.shuffle(drawn)
        return Seeds(drawn, cluster)

    def _take(
        self, source: Sequence[Prompt], up_to: int, have: list[Prompt], randomness: random.Random
    ) -> list[Prompt]:
        """``have`` with prompts of ``source`` that fit, until there are ``up_to``."""
        taken = list(have)
        known = {prompt.prompt_id for prompt in taken}
        left = list(range(len(source))) if len(taken) < up_to else []
        while left and len(taken) < up_to:
            position = randomness.randrange(len(left))
            left[position], left[-1] = left[-1], left[position]
            prompt = source[left.pop()]
            if prompt.prompt_id not in known and self._fits(prompt.prompt):
                known.add(prompt.prompt_id)
                taken.append(prompt)
        return taken


def of_shard(clusters: dict[int, list[Prompt]], shard: int, num_shards: int) -> dict[int, list[Prompt]]:
    """The clusters of a shard: every one belongs to one shard; with fewer clusters than shards, all to each."""
    numbers = sorted(clusters)
    own = numbers[shard::num_shards] if len(numbers) >= num_shards else numbers
    return {number: clusters[number] for number in own}
