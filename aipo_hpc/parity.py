"""Do generation, ranking and training see the same tokens? Asked of the tokenizers, before anything is submitted.

A conversation that a model has learnt is one sequence of ids, laid down by its chat template. Here it is taken apart as this
package takes it apart, and each part compared with it:

    generator   the prompt's ids, which the template must continue with the answer and the end-of-sequence token
    trainer     the prompt's ids and those of the answer as text, the end-of-sequence token behind them
    ranker      of a reward model or judge: the same conversation by its own tokenizer

so that a doubled beginning, a header that is missing, text that the template changes, or an end that the model does not stop
at is told by the first token that differs.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aipo_hpc.chat_templates import TEMPLATE
from aipo_hpc.errors import DataError
from aipo_hpc.graph import Edge, Graph
from aipo_hpc.outside import Outside
from aipo_hpc.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Render = Callable[[PreTrainedTokenizerBase, Sequence[Message]], list[int]]

QUESTION, ANSWER = (
    Message("user", "Which of the two is larger, 9 or 11?"),
    Message("assistant", "The larger one is 11."),
)
FOLLOW_UP = Message("user", "And of 5 and 3?")
_AROUND = 4
"""Tokens shown before and after the first that differs."""


def check_parity(graph: Graph) -> None:
    """Compare what the jobs of a resolved graph will see. Raises DataError with the first token that differs."""
    systems = sorted({text for job in graph.jobs.values() if (text := getattr(job.config, "system_message", None))})
    policies = {source.value for source in _outside(graph, "policy")}
    for policy in sorted(policies):
        check_policy(policy, systems)
    for ranker in sorted({source.value for source in _outside(graph, "ranker")} - policies):
        if _has_chat_template(Path(ranker)):
            check_ranker(ranker, systems)


def check_policy(name: str, system_messages: Sequence[str] = ()) -> None:
    """Compare generator and trainer for a policy."""
    from aipo_hpc.chat import load_tokenizer

    tokenizer = load_tokenizer(name)
    _check_end(name, tokenizer)
    for system in (None, *system_messages):
        start = [] if system is None else [Message("system", system)]
        for messages in ([*start, QUESTION], [*start, QUESTION, ANSWER, FOLLOW_UP]):
            _compare(name, tokenizer, messages)


def check_ranker(name: str, system_messages: Sequence[str] = ()) -> None:
    """Check what a ranker with a chat template of its own reads: every word of the conversation, and one beginning."""
    from aipo_hpc.chat import conversation_ids, load_tokenizer

    tokenizer = load_tokenizer(name)
    for system in (None, *system_messages):
        messages = [*([] if system is None else [Message("system", system)]), QUESTION, ANSWER]
        ids = _rendered(name, "ranker", conversation_ids, tokenizer, messages)
        _check_beginning(name, "ranker", tokenizer, ids)
        read = tokenizer.decode(ids)
        for message in messages:
            if message.content.strip() not in read:
                raise DataError(
                    f"ranker {name!r}: its chat template leaves out or changes what the {message.role} says.\n"
                    f"  said  {message.content!r}\n  read  {read!r}\nMend chat_template.jinja in its folder."
                )


def _compare(name: str, tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> None:
    from aipo_hpc.chat import conversation_ids, prompt_ids, response_ids, response_text

    prompt = _rendered(name, "generator", prompt_ids, tokenizer, messages)
    whole = _rendered(name, "chat template", conversation_ids, tokenizer, [*messages, ANSWER])
    if len(messages) < 3:  # later questions may each begin a sequence of their own
        _check_beginning(name, "generator", tokenizer, prompt)
        _check_beginning(name, "chat template", tokenizer, whole)
    if whole[: len(prompt)] != prompt:
        raise DataError(
            f"policy {name!r}: the chat template does not go on from the prompt that it gives, so what is generated and "
            "what was learnt differ.\n"
            + difference(tokenizer, {"generator, prompt": prompt, "template, whole": whole[: len(prompt)]})
            + "\nMend the template: with add_generation_prompt it must give the beginning of the whole conversation."
        )
    end = int(tokenizer.eos_token_id)
    rest = whole[len(prompt) :]
    if end not in rest:
        raise DataError(
            f"policy {name!r}: its chat template ends an answer with {_shown(tokenizer, rest[-2:])}, but its eos_token is "
            f"{tokenizer.eos_token!r}, which training puts behind an answer and generation stops at. Set eos_token in "
            "tokenizer_config.json to the token that ends a turn, or mend the template."
        )
    emitted = rest[: rest.index(end) + 1]
    if str(tokenizer.decode(emitted[:-1])).strip() != ANSWER.content:
        expected = [*prompt, *response_ids(tokenizer, ANSWER.content, "stop")]
        raise DataError(
            f"policy {name!r}: behind the prompt, its chat template has more or something else than the answer.\n"
            + difference(tokenizer, {"trainer": expected, "template": [*prompt, *emitted]})
            + "\nMend the template: with add_generation_prompt it must end where the answer begins, and it must not change "
            "what the assistant says."
        )
    trained = response_ids(tokenizer, response_text(tokenizer, emitted[:-1]), "stop")
    if trained != emitted:
        raise DataError(
            f"policy {name!r}: an answer becomes other tokens when its text is read again.\n"
            + difference(tokenizer, {"generator": [*prompt, *emitted], "trainer": [*prompt, *trained]})
            + "\nUse the tokenizer that the model was made with, or a chat template that ends in a whole token."
        )


def _check_beginning(name: str, who: str, tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> None:
    """One beginning-of-sequence token at most, unless that token ends turns as well."""
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id or list(ids).count(bos) <= 1:
        return
    second = [position for position, token in enumerate(ids) if token == bos][1]
    raise DataError(
        f"{name!r}: the {who} begins a conversation twice, with {tokenizer.bos_token!r} again at token {second}: "
        f"{_shown(tokenizer, ids[: second + _AROUND])}. Write bos_token once in the chat template."
    )


def _check_end(name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """What training puts behind an answer is what the model's own settings stop generation at."""
    stops: set[int] = set()
    for file in ("generation_config.json", "config.json"):
        path = Path(name) / file
        if path.is_file() and not stops:
            told = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            stops = set(told if isinstance(told, list) else [] if told is None else [told])
    if stops and tokenizer.eos_token_id not in stops:
        raise DataError(
            f"policy {name!r}: training ends an answer with eos_token {tokenizer.eos_token!r} "
            f"({tokenizer.eos_token_id}), but the model's own settings end generation at "
            f"{_shown(tokenizer, sorted(stops))} ({', '.join(map(str, sorted(stops)))}). "
            "Make eos_token in tokenizer_config.json and eos_token_id in generation_config.json agree."
        )


def difference(tokenizer: "PreTrainedTokenizerBase", views: Mapping[str, Sequence[int]]) -> str:
    """Where two sequences of ids part, with the tokens around it on both sides."""
    (first, one), (second, two) = views.items()
    shared = min(len(one), len(two))
    at = next((position for position in range(shared) if one[position] != two[position]), shared)
    width = max(len(first), len(second))
    lines = [f"  token {at}:"]
    for who, ids in views.items():
        before = _shown(tokenizer, ids[max(0, at - _AROUND) : at])
        after = _shown(tokenizer, ids[at : at + _AROUND]) or "(the end)"
        lines.append(f"    {who:<{width}}  {before} >> {after}")
    return "\n".join(lines)


def _shown(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return " ".join(repr(tokenizer.decode([token])) for token in ids)


def _rendered(
    name: str, who: str, render: "Render", tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]
) -> list[int]:
    from jinja2 import TemplateError

    try:
        return render(tokenizer, messages)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"{name!r}: its chat template refuses a conversation that the {who} has to read: {error}. If it takes no system "
            "message, leave generate.system_message unset and set generate.keep_system_message=False."
        ) from error


def _has_chat_template(folder: Path) -> bool:
    if (folder / TEMPLATE).is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))


def _outside(graph: Graph, name: str) -> list[Outside]:
    """Inputs of that name, or of that name and a number, that come from outside the run."""
    return [
        source
        for job in graph.jobs.values()
        for key, source in job.inputs.items()
        if not isinstance(source, Edge) and key.partition(".")[0] == name
    ]
