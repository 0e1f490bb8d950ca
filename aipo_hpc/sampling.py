"""A shard's requests, sampled batch by batch: how a killed attempt, a poisoned prompt and a wish to leave meet an engine.

Batches keep the composition that they have in an undisturbed shard, so whole batches are asked for again. Prompts that may
kill their worker come last, each group alone. A wish to leave is heard between two batches; where the engine batches by
itself (vllm), between two prompts: what is in flight is still finished, if there is time.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import chain

from aipo_hpc import leaving
from aipo_hpc.engines import Completion, Engine, Request
from aipo_hpc.suspects import Suspects


def in_batches(prompt_ids: Sequence[str], size: int) -> list[Sequence[str]]:
    """Batches of ``size``; one of all of them for an engine that batches by itself (1)."""
    step = size if size > 1 else max(1, len(prompt_ids))
    return [prompt_ids[start : start + step] for start in range(0, len(prompt_ids), step)]


def sample(
    batches: Sequence[Sequence[str]],
    size: int,
    requests: Mapping[str, Sequence[Request]],
    finished: Container[str],
    suspects: Suspects,
    engine: Callable[[], Engine],
    where: str,
) -> Iterator[Completion]:
    """Yield the completions of what is not ``finished``, and of what is in one batch with it.

    ``requests``: those of each prompt. ``finished`` is looked at again as it grows. ``engine`` loads it, if there is anything
    to do. Raises Left if this process was asked to leave and not all is finished.
    """
    for batch in chain.from_iterable(suspects.rounds(batches, finished)):
        leaving.here(where)
        wanted = batch if size > 1 else [each for each in batch if each not in finished]
        yield from engine().generate(_begun(wanted, size, requests, suspects))
    if not all(each in finished for batch in batches for each in batch):
        leaving.here(where)


def _begun(
    prompt_ids: Sequence[str], size: int, requests: Mapping[str, Sequence[Request]], suspects: Suspects
) -> Iterator[Sequence[Request]]:
    """The requests of prompts, each noted as begun when the engine takes it."""
    for prompt_id in prompt_ids:
        if size == 1 and leaving.asked() == leaving.STOP:
            return
        suspects.begin([prompt_id])
        yield requests[prompt_id]
