"""Parity: tokenizers that were broken on purpose are refused, each with the first token that differs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import CHAT_TEMPLATE, tiny_model_folder, tiny_tokenizer_folder

from aipo_hpc import launch, parity
from aipo_hpc.chat import conversation_ids, load_tokenizer, prompt_ids, response_ids, response_text
from aipo_hpc.chat_templates import read_template
from aipo_hpc.errors import DataError
from aipo_hpc.parity import check_policy, check_ranker, difference
from aipo_hpc.recipe import Recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_tokenizer_folder(tmp_path / "model")


def with_template(folder: Path, text: str) -> Path:
    (folder / "chat_template.jinja").write_text(text)
    return folder


def refused(check: Callable[[str], None], folder: Path) -> str:
    with pytest.raises(DataError) as raised:
        check(str(folder))
    text = str(raised.value)
    print(text)
    assert str(folder) in text
    return text


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_sound_tokenizer_passes(tmp_path: Path, adds_bos: bool) -> None:
    model = str(tiny_tokenizer_folder(tmp_path / "t", adds_bos=adds_bos))
    check_policy(model, ["Be brief.", ""])
    check_ranker(model, ["Be brief."])


def test_a_beginning_that_comes_twice_is_refused(folder: Path) -> None:
    text = refused(check_policy, with_template(folder, "{{ bos_token }}" + CHAT_TEMPLATE))
    assert "the generator begins a conversation twice, with '<s>' again at token 1: '<s>' '<s>' '<|user|>'" in text
    text = refused(check_ranker, folder)
    assert "the ranker begins a conversation twice" in text


def test_a_template_that_strips_what_it_said_to_the_generator_is_refused(folder: Path) -> None:
    # Behind <|assistant|> the whole conversation lacks the line break that the prompt ends with.
    stripping = CHAT_TEMPLATE.replace(
        "<|{{ message['role'] }}|>\n{{",
        "<|{{ message['role'] }}|>{% if message['role'] != 'assistant' %}{{ '\\n' }}{% endif %}{{",
    )
    text = refused(check_policy, with_template(folder, stripping))
    assert "does not go on from the prompt that it gives" in text
    assert "generator, prompt" in text and "'<|assistant|>' >> '\\n'" in text
    assert "template, whole" in text and "'<|assistant|>' >> 'T'" in text


def test_a_template_that_changes_what_the_assistant_says_is_refused(folder: Path) -> None:
    cutting = CHAT_TEMPLATE.replace("message['content']", "(message['content'] | replace('larger ', ''))")
    text = refused(check_policy, with_template(folder, cutting))
    assert "has more or something else than the answer" in text
    assert "trainer " in text and "template " in text


def test_a_missing_generation_prompt_is_refused(folder: Path) -> None:
    without = CHAT_TEMPLATE.partition("{% if add_generation_prompt %}")[0]
    text = refused(check_policy, with_template(folder, without))
    assert "has more or something else than the answer" in text
    assert "with add_generation_prompt it must end where the answer begins" in text
    assert "trainer  " in text and ">> 'T'" in text
    assert ">> '<|assistant|>' '\\n'" in text


def test_an_end_of_turn_that_is_not_the_end_token_is_refused(folder: Path) -> None:
    text = refused(check_policy, with_template(folder, CHAT_TEMPLATE.replace("</s>", "<pad>")))
    assert "its chat template ends an answer with '<pad>' '\\n', but its eos_token is '</s>'" in text


def test_an_end_token_that_generation_does_not_stop_at_is_refused(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model", layers=1)
    check_policy(str(model))
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [3, 5]}))
    text = refused(check_policy, model)
    assert "training ends an answer with eos_token '</s>' (2)" in text
    assert "end generation at '<pad>' '<|assistant|>' (3, 5)" in text
    (model / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 5]}))
    check_policy(str(model))


def test_a_prompt_that_ends_within_a_token_is_refused(folder: Path) -> None:
    # The template's text makes one token of the prompt's end and the answer's beginning.
    merging = CHAT_TEMPLATE.replace("<|{{ message['role'] }}|>\n{{", "<|{{ message['role'] }}|>\nthe da{{").replace(
        "<|assistant|>\n{% endif", "<|assistant|>\nthe da{% endif"
    )
    check_policy(str(with_template(folder, merging)))
    merging = merging.replace("the da", "wh")
    said = parity.ANSWER
    parity_answer = replace(said, content="y not.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "ANSWER", parity_answer)
        text = refused(check_policy, with_template(folder, merging))
    assert "does not go on from the prompt that it gives" in text
    assert ">> 'wh'" in text and ">> 'why'" in text


def test_a_template_without_a_place_for_the_recipes_system_message_is_refused(folder: Path) -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    )
    check_policy(str(with_template(folder, strict)))
    text = refused(lambda name: check_policy(name, ["Be brief."]), folder)
    assert "refuses a conversation that the generator has to read: no system role" in text
    assert "leave generate.system_message unset" in text


def test_a_ranker_whose_template_leaves_words_out_is_refused(folder: Path) -> None:
    text = refused(check_ranker, with_template(folder, "{{ messages[0]['content'] }}"))
    assert "its chat template leaves out or changes what the assistant says" in text


def test_the_first_difference_is_told_with_its_surroundings(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    one = [0, 1, 2, 3, 4, 5, 6]
    assert difference(tokenizer, {"a": one, "longer": [*one[:5], 2]}).splitlines() == [
        "  token 5:",
        "    a       '<s>' '</s>' '<pad>' '<|user|>' >> '<|assistant|>' '<|system|>'",
        "    longer  '<s>' '</s>' '<pad>' '<|user|>' >> '</s>'",
    ]
    assert difference(tokenizer, {"a": [1], "b": [1, 2]}).splitlines()[1:] == [
        "    a  '<s>' >> (the end)",
        "    b  '<s>' >> '</s>'",
    ]


def test_a_launch_refuses_before_anything_is_submitted_and_asks_no_more_once_it_has_begun(
    small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubled = tmp_path / "doubled.jinja"
    doubled.write_text("{{ bos_token }}" + CHAT_TEMPLATE)
    recipe = replace(small_recipe, drive="prepare")
    with pytest.raises(DataError, match="begins a conversation twice"):
        launch.launch(replace(recipe, chat_template=str(doubled)))
    assert not (tmp_path / "run" / "recipe.json").exists()
    asked: list[object] = []
    monkeypatch.setattr(launch, "check_parity", asked.append)
    launch.launch(recipe)
    launch.launch(recipe)
    assert len(asked) == 1


def test_a_tokenizer_that_writes_spaces_as_llamas_does_passes_and_an_answer_begins_without_one(tmp_path: Path) -> None:
    """Behind a prompt, the text of its first token has a space, which would come twice if it were read again."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )
    texts = [
        parity.QUESTION.content,
        parity.ANSWER.content,
        parity.FOLLOW_UP.content,
        "[INST] [/INST] USER: ASSISTANT:\n",
    ]
    trainer = trainers.BpeTrainer(vocab_size=4, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    for name in ("mistral-instruct", "llama", "vicuna"):
        fast.chat_template = read_template(name)
        fast.save_pretrained(tmp_path / name)
        check_policy(str(tmp_path / name))
        loaded = load_tokenizer(str(tmp_path / name))
        prompt = prompt_ids(loaded, [parity.QUESTION])
        emitted = conversation_ids(loaded, [parity.QUESTION, parity.ANSWER])[len(prompt) :]
        said = emitted[: emitted.index(loaded.eos_token_id)]
        behind = loaded.decode([*prompt, *said])[len(loaded.decode(prompt)) :]
        assert (behind[0], response_text(loaded, said).strip()) == (" ", parity.ANSWER.content)
        assert not response_text(loaded, said).startswith(" ")
        assert response_ids(loaded, response_text(loaded, said), "length") == said
