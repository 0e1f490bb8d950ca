"""Token ids of conversations: one beginning, a clean boundary, and an end only where the model ended."""

import json
from pathlib import Path

import pytest
from tiny_models import tiny_tokenizer_folder

from aipo_hpc.chat import load_tokenizer, prompt_ids, response_ids
from aipo_hpc.errors import DataError
from aipo_hpc.rows import Message

CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "why?"),
    Message("assistant", "so"),
    Message("user", "?"),
]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_conversation_begins_with_exactly_one_beginning_token(tmp_path: Path, adds_bos: bool) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer_folder(tmp_path / "t", adds_bos=adds_bos)))
    assert (tokenizer("why")["input_ids"][0] == tokenizer.bos_token_id) == adds_bos
    ids = prompt_ids(tokenizer, CONVERSATION)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids) == (
        "<s><|system|>\nBe brief.</s>\n<|user|>\nwhy?</s>\n<|assistant|>\nso</s>\n<|user|>\n?</s>\n<|assistant|>\n"
    )


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_response_has_no_beginning_token_and_ends_only_if_the_model_ended_it(tmp_path: Path, adds_bos: bool) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer_folder(tmp_path / "t", adds_bos=adds_bos)))
    whole, cut = (response_ids(tokenizer, "red fish", reason) for reason in ("stop", "length"))
    assert tokenizer.bos_token_id not in whole
    assert whole == [*cut, tokenizer.eos_token_id]
    assert tokenizer.decode(cut) == "red fish"
    assert response_ids(tokenizer, "", "stop") == [tokenizer.eos_token_id]


def test_nothing_merges_over_the_boundary_of_prompt_and_response(tmp_path: Path) -> None:
    folder = tiny_tokenizer_folder(tmp_path / "t")
    # This template ends in the middle of what would be one token with the response's first letters.
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }} fi")
    tokenizer = load_tokenizer(str(folder))
    together = tokenizer("one fish", add_special_tokens=False)["input_ids"]
    prompt, response = prompt_ids(tokenizer, [Message("user", "one")]), response_ids(tokenizer, "sh", "length")
    assert prompt + response != together
    assert tokenizer.decode(prompt) == "one fi"
    assert tokenizer.decode(response) == "sh"


def test_text_that_looks_like_a_special_token_is_still_one_response(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer_folder(tmp_path / "t")))
    ids = response_ids(tokenizer, "red", "stop")
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_without_a_chat_template_or_an_end_token_is_refused(tmp_path: Path) -> None:
    folder = tiny_tokenizer_folder(tmp_path / "t")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError) as raised:
        load_tokenizer(str(folder))
    assert str(raised.value) == (
        f"tokenizer of {str(folder)!r} has no chat template, so it is not known how a prompt is put to this model. "
        "Use an instruction-tuned model, or add chat_template.jinja to the model's folder."
    )
    (folder / "chat_template.jinja").write_text(template)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError) as raised:
        load_tokenizer(str(folder))
    assert str(raised.value) == f"tokenizer of {str(folder)!r} has no eos_token: set it in tokenizer_config.json."


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as raised:
        load_tokenizer(str(tmp_path / "empty"))
    assert str(raised.value).startswith(f"tokenizer of {str(tmp_path / 'empty')!r} cannot be loaded: ")
    assert str(raised.value).endswith(
        "\nGive a folder with tokenizer files, or a model id that is in the local Hugging Face cache or on the hub."
    )
