"""Questions put to a language model that judges, and its replies; through the same engines that generate.

Each reply has a seed of its own, derived from (seed, prompt id, what is asked about, sample): it depends neither on what else
is asked nor on retries, as far as the engine's arithmetic is independent of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from aipo_hpc.chat import load_tokenizer, prompt_ids
from aipo_hpc.engines import Engine, Request, load_engine
from aipo_hpc.rankers import TOO_LONG
from aipo_hpc.rankers.config import JudgeConfig
from aipo_hpc.rankers.fitting import fit
from aipo_hpc.rows import Message
from aipo_hpc.seeds import derived_seed


@dataclass(frozen=True)
class Question:
    """One question; ``about`` tells it from the others about the same prompt, ``truncated`` which responses were cut."""

    prompt_id: str
    about: str
    token_ids: tuple[int, ...]
    truncated: tuple[bool, ...]


class Asker:
    """A language model, its tokenizer, and how it is asked."""

    def __init__(self, config: JudgeConfig, model: str, revision: str | None = None, seed: int = 0) -> None:
        """Load the model. Raises RecipeError or DataError as the engines and ``load_tokenizer`` do."""
        # Greedy replies to one question are all the same.
        self._config = replace(config, num_samples=1) if config.temperature == 0 else config
        self._seed = seed
        self._tokenizer = load_tokenizer(model, revision)
        self._engine: Engine = load_engine(self._config, model)

    def question(
        self, prompt_id: str, about: str, put: Callable[[Sequence[str]], str], responses: Sequence[str]
    ) -> Question | str:
        """The question whose text ``put`` makes of the responses, which are cut if they must; or why it cannot be asked."""
        from jinja2 import TemplateError

        def encode(texts: Sequence[str]) -> list[int]:
            return prompt_ids(self._tokenizer, [Message("user", put(texts))])

        try:
            fitted = fit(self._tokenizer, encode, responses, self._config.max_prompt_tokens)
        except (TemplateError, UnicodeError, TypeError, ValueError) as error:
            return f"chat template: {error}"
        return TOO_LONG if fitted is None else Question(prompt_id, about, tuple(fitted[0]), fitted[1])

    def replies(self, questions: Sequence[Question]) -> list[list[str]]:
        """The replies to each question, ``num_samples`` of them; an empty one where the engine gave none."""
        found = [[""] * self._config.num_samples for _ in questions]
        requests = [
            [
                Request(str(number), sample, question.token_ids, self._seed_of(question, sample))
                for sample in range(self._config.num_samples)
            ]
            for number, question in enumerate(questions)
        ]
        for done in self._engine.generate(requests) if requests else ():
            found[int(done.request.prompt_id)][done.request.candidate] = done.text
        return found

    def _seed_of(self, question: Question, sample: int) -> int:
        return derived_seed(self._seed, question.prompt_id, question.about, sample)


def conversation(messages: Sequence[Message]) -> str:
    """A conversation as plain text, a heading for each turn but the only one."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in messages)
