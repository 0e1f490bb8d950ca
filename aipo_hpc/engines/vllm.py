"""Sampling with vLLM: requests go in one by one with seeds of their own and come out as they finish.

A window of requests is kept queued, so the batch never drains and memory does not grow with the shard; a request that vLLM
refuses is reported and hurts no other.
"""

import atexit
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import TYPE_CHECKING, Any

from aipo_hpc.chat import response_text
from aipo_hpc.engines import Completion, EngineConfig, Request, temperature_of
from aipo_hpc.engines.guard import guard_children
from aipo_hpc.errors import RecipeError
from aipo_hpc.own_code import is_trusted

if TYPE_CHECKING:
    from vllm import LLM

_WINDOW = 4
"""Requests kept queued, in multiples of max_num_seqs."""


class VllmEngine:
    """A vLLM engine; its worker processes end with this process."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        """Start the engine. Raises RecipeError for settings that vLLM does not take, e.g. more tokens than the model can."""
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        guard_children(os.getpid())
        self._config = config
        others = active_children()
        try:
            self._llm = LLM(
                model=model,
                trust_remote_code=is_trusted(model),
                dtype=config.dtype,  # type: ignore[arg-type]
                max_model_len=config.max_prompt_tokens + config.max_tokens,
                tensor_parallel_size=config.tensor_parallel_size,
                gpu_memory_utilization=config.gpu_memory_utilization,
                max_num_seqs=config.max_num_seqs,
                enforce_eager=config.enforce_eager,
                enable_prefix_caching=True,
                disable_log_stats=True,
            )
        except ValueError as error:
            raise RecipeError(
                f"vllm does not take these settings for {model}: {error}\nMend the {config.section}.* fields it speaks of "
                f"(max_model_len is max_prompt_tokens={config.max_prompt_tokens} + max_tokens={config.max_tokens})."
            ) from error
        _tell_of_death(self._llm, [each for each in active_children() if each not in others])
        # An engine that is still referenced at the exit (by an error's frames, say) must end before multiprocessing waits
        # for its processes, which may be before vLLM's own finalizers run: what is registered last runs first.
        atexit.register(_end, weakref.ref(self._llm))

    def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Yield each completion as it finishes."""
        engine = self._llm.llm_engine
        tokenizer: Any = self._llm.get_tokenizer()
        waiting = iter(chain.from_iterable(requests))
        flying: dict[str, Request] = {}
        names = map(str, count())
        while True:
            for request in islice(waiting, _WINDOW * self._config.max_num_seqs - len(flying)):
                name = next(names)
                error = self._add(name, request)
                if error is None:
                    flying[name] = request
                else:
                    yield Completion(request, "", "error", 0, error)
            if not flying:
                return
            for output in engine.step():
                if not output.finished:
                    continue
                request = flying.pop(output.request_id)
                sample: Any = output.outputs[0]  # type: ignore[index]
                reason = str(sample.finish_reason)
                if reason not in ("stop", "length"):
                    yield Completion(request, "", "error", 0, f"vllm finished it with {reason!r}")
                    continue
                yield Completion(request, _text(tokenizer, sample), reason, len(sample.token_ids))

    def _add(self, name: str, request: Request) -> str | None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        config = self._config
        params = SamplingParams(
            temperature=temperature_of(request, config),
            top_p=config.top_p,
            top_k=config.top_k,
            max_tokens=config.max_tokens,
            seed=request.seed,
            stop=list(request.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(request.prompt_token_ids)}, params)
        except (ValueError, TypeError, VLLMClientError) as error:
            return f"vllm refused it: {error}"
        return None


def _text(tokenizer: Any, sample: Any) -> str:
    """What was said, without the token that ended it; vLLM's own text where a text ended it."""
    if isinstance(sample.stop_reason, str):
        return str(sample.text)
    return response_text(tokenizer, sample.token_ids[:-1] if sample.finish_reason == "stop" else sample.token_ids)


def _tell_of_death(llm: "LLM", processes: Sequence[BaseProcess]) -> None:
    """Have whoever waits for the engine's output told when one of its processes is gone.

    vLLM's own watch ends the thread that reads the output, and the reader waits for ever (seen with 0.32).
    """
    output: Any = getattr(llm.llm_engine.engine_core, "outputs_queue", None)
    if output is None or not processes:
        return  # the engine is in this process

    def watch() -> None:
        wait([process.sentinel for process in processes])
        output.put(
            RuntimeError("EngineDeadError: a process of vllm's engine has ended; the end of the log may tell why")
        )

    Thread(target=watch, daemon=True).start()


def _end(engine: "weakref.ref[LLM]") -> None:
    """End the processes of an engine, if it is still there."""
    llm = engine()
    if llm is not None:
        llm.llm_engine.engine_core.shutdown()
