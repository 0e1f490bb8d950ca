"""Conversations as token ids: the one place where generation, reference and training get them from.

Because prompt and response become ids separately and are joined as ids, nothing can merge over the boundary and no
second beginning-of-sequence token can slip in.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aipo_hpc.errors import DataError
from aipo_hpc.own_code import is_trusted
from aipo_hpc.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model_name_or_path: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a chat model.

    Raises DataError when it cannot be loaded, has no chat template or no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            model_name_or_path, revision=revision, trust_remote_code=is_trusted(model_name_or_path)
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"tokenizer of {model_name_or_path!r} cannot be loaded: {error}\n"
            "Give a folder with tokenizer files, or a model id that is in the local Hugging Face cache or on the hub."
        ) from error
    if tokenizer.chat_template is None:
        raise DataError(
            f"tokenizer of {model_name_or_path!r} has no chat template, so it is not known how a prompt is put to this "
            "model. Use an instruction-tuned model, or add chat_template.jinja to the model's folder."
        )
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer of {model_name_or_path!r} has no eos_token: set it in tokenizer_config.json.")
    return tokenizer  # type: ignore[no-any-return]


def refuse_other_tokens(policy: str, reference: str) -> None:
    """Raise DataError if two models read the same ids as different text, so that their likelihoods have nothing in common."""
    from transformers import AutoTokenizer

    try:
        known, other = (
            AutoTokenizer.from_pretrained(name, trust_remote_code=is_trusted(name)).get_vocab()
            for name in (policy, reference)
        )
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizers of {policy!r} and {reference!r} cannot be compared: {error}") from error
    different = sorted(token for token, number in known.items() if other.get(token) != number)
    if different:
        raise DataError(
            f"reference {reference!r} has other tokens than the policy {policy!r}: {len(different)} differ, the first is "
            f"{different[0]!r}. Set reference.model to previous, initial, or a model with the policy's tokenizer."
        )


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant starts to speak."""
    return _template(tokenizer, messages, add_generation_prompt=True)


def response_ids(tokenizer: "PreTrainedTokenizerBase", response: str, finish_reason: str) -> list[int]:
    """Token ids of a response; the end-of-sequence token belongs to it only if the model ended it by itself."""
    ids = [int(token) for token in tokenizer(response, add_special_tokens=False)["input_ids"]]
    return ids if finish_reason == "length" else [*ids, int(tokenizer.eos_token_id)]


def response_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of a response's tokens, which becomes the same tokens again."""
    # Not the engine's own text: behind a prompt, that of a SentencePiece tokenizer begins with a space which is none.
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def conversation_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of a whole conversation, the assistant's last answer included."""
    return _template(tokenizer, messages, add_generation_prompt=False)


def _template(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
    )
    return [int(token) for token in encoded["input_ids"]]
