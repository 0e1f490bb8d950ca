"""Chat templates that come along, against text written by hand; and a model that is used with another than its own."""

import json
import os
from pathlib import Path

import pytest
from tiny_models import tiny_model_folder, tiny_tokenizer_folder

from aipo_hpc.chat import conversation_ids, load_tokenizer, prompt_ids
from aipo_hpc.chat_templates import make_templated_folder, names, read_template
from aipo_hpc.errors import RecipeError
from aipo_hpc.parity import check_policy
from aipo_hpc.rows import Message

SYSTEM, WHY, SO, WHO = (
    Message("system", "Be brief."),
    Message("user", "why?"),
    Message("assistant", "so"),
    Message("user", "who?"),
)

PROMPTS = {
    "mistral-instruct": "<s>[INST] Be brief.\n\nwhy? [/INST] so</s>[INST] who? [/INST]",
    "llama": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nwhy? [/INST] so </s><s>[INST] who? [/INST]",
    "vicuna": "<s>Be brief.\n\nUSER: why?\nASSISTANT: so</s>\nUSER: who?\nASSISTANT:",
    "zephyr": "<s><|system|>\nBe brief.</s>\n<|user|>\nwhy?</s>\n<|assistant|>\nso</s>\n<|user|>\nwho?</s>\n<|assistant|>\n",
}
WITHOUT_SYSTEM = {
    "mistral-instruct": ("<s>[INST] why? [/INST]", " so</s>"),
    "llama": ("<s>[INST] why? [/INST]", " so </s>"),
    "vicuna": ("<s>USER: why?\nASSISTANT:", " so</s>\n"),
    "zephyr": ("<s><|user|>\nwhy?</s>\n<|assistant|>\n", "so</s>\n"),
}
EMPTY_SYSTEM = {
    "mistral-instruct": "<s>[INST] why? [/INST]",
    "llama": "<s>[INST] <<SYS>>\n\n<</SYS>>\n\nwhy? [/INST]",
    "vicuna": "<s>USER: why?\nASSISTANT:",
    "zephyr": "<s><|system|>\n</s>\n<|user|>\nwhy?</s>\n<|assistant|>\n",
}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "adds_bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder; the second one puts a beginning before whatever it encodes, as those of Llama do."""
    return tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer") / "t", adds_bos=request.param)


def test_every_template_has_its_texts_here() -> None:
    assert sorted(PROMPTS) == sorted(WITHOUT_SYSTEM) == sorted(EMPTY_SYSTEM) == names()


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_a_template_gives_the_text_that_models_of_its_kind_have_learnt(name: str, folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = read_template(name)
    assert tokenizer.decode(prompt_ids(tokenizer, [SYSTEM, WHY, SO, WHO])) == PROMPTS[name]
    prompt, rest = WITHOUT_SYSTEM[name]
    assert tokenizer.decode(prompt_ids(tokenizer, [WHY])) == prompt
    assert tokenizer.decode(conversation_ids(tokenizer, [WHY, SO])) == prompt + rest
    assert tokenizer.decode(prompt_ids(tokenizer, [Message("system", ""), WHY])) == EMPTY_SYSTEM[name]


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_generation_and_training_see_the_same_with_each_template(name: str, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in folder.iterdir():
        (model / path.name).symlink_to(path)
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text(read_template(name))
    check_policy(str(model), ["Be brief.", ""])


@pytest.mark.parametrize("name", ["mistral-instruct", "llama", "vicuna"])
def test_a_system_message_in_the_middle_is_refused_where_a_template_has_no_place_for_it(
    name: str, folder: Path
) -> None:
    from jinja2 import TemplateError

    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = read_template(name)
    with pytest.raises(TemplateError, match=f"{name}: a system message can only be the first"):
        prompt_ids(tokenizer, [WHY, SYSTEM, WHO])


def test_a_template_of_ones_own_is_a_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}")
    assert read_template(str(mine)) == mine.read_text()


def test_a_template_that_is_not_there_or_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        read_template("zepyr")
    assert str(raised.value) == (
        "chat_template='zepyr': neither one of llama, mistral-instruct, vicuna, zephyr nor a file. "
        "Did you mean 'zephyr'? Leave it unset for the tokenizer's own."
    )
    bad = tmp_path / "bad.jinja"
    bad.write_text("{% for message in messages %}")
    with pytest.raises(RecipeError, match=r"bad\.jinja is not a Jinja template: Unexpected end of template"):
        read_template(str(bad))


def test_a_model_with_another_template_is_a_folder_of_links_that_loads_and_hands_it_on(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model_folder(tmp_path / "model", layers=1)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ 'its own' }}"}))
    folder, text = tmp_path / "run" / "policy-1", read_template("zephyr")
    make_templated_folder(model, text, folder)
    assert (folder / "model.safetensors").is_symlink()
    assert os.path.samefile(folder / "model.safetensors", model / "model.safetensors")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode(prompt_ids(tokenizer, [WHY])) == WITHOUT_SYSTEM["zephyr"][0]
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 512
    tokenizer.save_pretrained(tmp_path / "trained")
    assert load_tokenizer(str(tmp_path / "trained")).chat_template == text
    before = (folder / "chat_template.jinja").stat().st_ino
    make_templated_folder(model, text, folder)
    assert (folder / "chat_template.jinja").stat().st_ino == before, "a worker may be reading it"
    assert [path.name for path in folder.parent.iterdir()] == ["policy-1"]
