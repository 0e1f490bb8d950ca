"""A shard's requests, sampled batch by batch: how a killed attempt, a poisoned prompt and a wish to leave meet an engine.

Batches keep the composition that they have in an undisturbed shard, so whole batches are asked for again. Prompts that may
kill their worker come last, each group alone. A wish to leave is heard between two batches; where the engine batches by
itself (vllm), between two prompts: what is in flight is still finished, if there is time.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

from aipo_hpc import leaving
from aipo_hpc.engines import Completion, Engine, Request
from aipo_hpc.suspects import Suspects


def in_batches(prompt_ids: Sequence[str], size: int) -> list[Sequence[str]]:
    """Batches of ``size``; for an engine that batches by itself (1), each prompt is one."""
    return [prompt_ids[start : start + size] for start in range(0, len(prompt_ids), size)]


def sample(
    rounds: Iterable[Iterable[Sequence[str]]],
    size: int,
    requests: Mapping[str, Sequence[Request]],
    finished: Container[str],
    suspects: Suspects,
    engine: Callable[[], Engine],
    where: str,
) -> Iterator[Completion]:
    """Yield the completions of what is not ``finished``, and of what is in one batch with it.

    ``rounds``: batches, each asked for as it is begun; before the first of a round, the round before is over. ``requests``:
    those of each prompt. ``finished`` is looked at again as it grows. ``engine`` loads it, if there is anything
    to do. Raises Left if this process was asked to leave and not all is finished.
    """
    for batches in rounds:
        leaving.here(where)
        loaded = engine()  # before a batch is asked for, which others may then not have
        each_alone = (each for batch in batches for each in batch if each not in finished)
        for wanted in batches if size > 1 else [each_alone]:
            leaving.here(where)
            yield from loaded.generate(_begun(wanted, size, requests, suspects))
    if not all(each in finished for each in requests):
        leaving.here(where)


def _begun(
    prompt_ids: Iterable[str], size: int, requests: Mapping[str, Sequence[Request]], suspects: Suspects
) -> Iterator[Sequence[Request]]:
    """The requests of prompts, each noted as begun when the engine takes it."""
    for prompt_id in prompt_ids:
        if size == 1 and leaving.asked() == leaving.STOP:
            return
        suspects.begin([prompt_id])
        yield requests[prompt_id]
