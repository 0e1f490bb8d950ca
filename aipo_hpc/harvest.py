"""What becomes of the tasks that self-instruct's calls bring: kept as prompts, or dropped with a reason each.

Calls are judged one after the other, so that what is kept depends on them and their order alone.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from aipo_hpc import instruct_filters as filters
from aipo_hpc.deduplication import Seen
from aipo_hpc.rows import Call, NewPrompt

DROPPED = "dropped.parquet"


@dataclass(frozen=True)
class DroppedTask:
    """A task that did not become a prompt."""

    call_id: str
    text: str
    reason: str


@dataclass(frozen=True)
class Rules:
    """What is kept."""

    tasks_per_call: int
    blocked_words: Sequence[str]
    min_tokens: int
    max_tokens: int
    near_duplicate: float
    num_per_cluster: int | None
    max_calls_per_prompt: float


class Harvest:
    """The prompts of a shard, up to ``wanted``. ``count`` tells a text's tokens; ``known`` is what none may repeat."""

    def __init__(
        self, rules: Rules, wanted: int, count: Callable[[str], int], known: Mapping[str, Sequence[str]]
    ) -> None:
        self._rules = rules
        self._wanted = wanted
        self._count = count
        self._seen = Seen(rules.near_duplicate)
        for group, texts in known.items():
            self._seen.remember(texts, group)
        self._of_cluster: Counter[int] = Counter()
        self.kept: list[NewPrompt] = []
        self.dropped: list[DroppedTask] = []
        self.num_calls = 0
        self.num_errors = 0

    @property
    def is_full(self) -> bool:
        """Whether there are as many as are wanted."""
        return len(self.kept) >= self._wanted

    def is_closed(self, cluster: int) -> bool:
        """Whether a cluster has as many as are wanted of it."""
        most = self._rules.num_per_cluster
        return most is not None and cluster >= 0 and self._of_cluster[cluster] >= most

    def expected_calls(self) -> int:
        """How many more calls it takes as things go; as if every call brought all it may, before there are any."""
        best, least = float(self._rules.tasks_per_call), 1 / self._rules.max_calls_per_prompt
        rate = max(least, len(self.kept) / self.num_calls) if self.num_calls else best
        return math.ceil((self._wanted - len(self.kept)) / rate)

    def take(self, call: Call) -> None:
        """Judge the tasks of a call. Those after the first ``tasks_per_call`` are not looked at."""
        self.num_calls += 1
        if call.error is not None:
            self.num_errors += 1
            return
        tasks = filters.tasks_of(call.text)
        for number, task in enumerate(tasks[: self._rules.tasks_per_call], 1):
            if self.is_full or self.is_closed(call.cluster):
                return
            is_cut_off = call.finish_reason == "length" and number == len(tasks)
            text = filters.without_answer(filters.capitalized(task))
            reason = "cut_off" if is_cut_off else self._unfit(text)
            if reason is not None:
                self.dropped.append(DroppedTask(call.call_id, text or task, reason))
                continue
            self.kept.append(NewPrompt(prompt_id_of(text), text, call.cluster, call.call_id))
            self._seen.remember([text], "new")
            self._of_cluster[call.cluster] += 1

    def _unfit(self, text: str) -> str | None:
        rules = self._rules
        reason = filters.unfit(text, rules.blocked_words) or filters.unfit_length(
            self._count(text), rules.min_tokens, rules.max_tokens
        )
        if reason is None and (match := self._seen.match(text)) is not None:
            return f"{'same' if match.exact else 'nearly_same'}_as_{match.group}"
        return reason


def prompt_id_of(text: str) -> str:
    """The id of a prompt that has none: a hash of its text."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
