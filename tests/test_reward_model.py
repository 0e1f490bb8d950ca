"""The reward model against the plain forward of one conversation at a time, and the traps around padding and heads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model_folder, tiny_tokenizer_folder

from aipo_hpc.chat import load_tokenizer
from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.rankers import NO_CANDIDATES, NOT_FINITE, TOO_LONG, from_texts, load_ranker
from aipo_hpc.rankers.config import RankerConfig
from aipo_hpc.rankers.reward_model import RewardModel, load
from aipo_hpc.rows import Candidate, Message, Responses

TALK = [Message("user", "what is snow"), Message("assistant", "rain"), Message("user", "explain why")]
ROWS = [
    *from_texts(
        ["why", "name one river", "tell a story"], [["red", "a small dog eats a fish", ""], ["x"], ["b c", "b"]]
    ),
    Responses("talk", "explain why", TALK, [Candidate("snow " * length, "stop", 0) for length in (1, 40, 7)]),
]


def llama(folder: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tiny_tokenizer_folder(folder, adds_bos=True)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    settings = {**sizes, **heads, "num_labels": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, **changes}
    _save(LlamaForSequenceClassification(LlamaConfig(**settings)), folder)
    return folder


def deberta(folder: Path) -> Path:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    tiny_tokenizer_folder(folder, adds_bos=True)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    relative = {"relative_attention": True, "position_buckets": 32, "pos_att_type": ["p2c", "c2p"]}
    settings = {**sizes, **relative, "num_attention_heads": 2, "type_vocab_size": 0, "position_biased_input": False}
    _save(DebertaV2ForSequenceClassification(DebertaV2Config(**settings, num_labels=1, pad_token_id=3)), folder)
    return folder


def _save(model: Any, folder: Path) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("reward")
    return {
        "llama": llama(base / "llama"),
        "llama without a padding token": llama(base / "no_pad", pad_token_id=None),
        "llama padded with its end": llama(base / "eos_pad", pad_token_id=2),
        "deberta": deberta(base / "deberta"),
    }


def ranker(folder: Path, **settings: Any) -> RewardModel:
    return load(RankerConfig(ranker="reward_model", **settings), str(folder), 0)


def plain_score(folder: Path, messages: list[Message], response: str) -> float:
    """One conversation at a time, through transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    turns = [{"role": each.role, "content": each.content} for each in (*messages, Message("assistant", response))]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


@pytest.mark.parametrize(
    "name", ["llama", "llama without a padding token", "llama padded with its end", "deberta"]
)  # fmt: skip
def test_scores_are_those_of_one_conversation_at_a_time_whatever_the_padding(
    folders: dict[str, Path], name: str
) -> None:
    rankings = ranker(folders[name]).rank(ROWS)
    for row, ranking in zip(ROWS, rankings, strict=True):
        expected = [plain_score(folders[name], row.messages, each.response) for each in row.candidates]
        assert ranking.scores == pytest.approx(expected, abs=1e-4)
        assert ranking.ranks[max(range(len(expected)), key=expected.__getitem__)] == 1
        assert ranking.truncated == (False,) * len(expected)
    scores = [score for ranking in rankings for score in ranking.scores]
    assert max(scores) - min(scores) > 0.05, "scores that do not differ prove nothing"


@pytest.mark.parametrize("name", ["llama", "llama without a padding token", "deberta"])
def test_a_score_does_not_depend_on_the_batch(folders: dict[str, Path], name: str) -> None:
    alone = ranker(folders[name], tokens_per_batch=1).rank(ROWS)
    together = ranker(folders[name], tokens_per_batch=100_000).rank(ROWS)
    for one, other in zip(alone, together, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_the_beginning_of_sequence_token_stands_there_once(folders: dict[str, Path]) -> None:
    model = ranker(folders["llama"])
    read = model._read(ROWS[3])
    assert not isinstance(read, str)
    tokenizer = load_tokenizer(str(folders["llama"]))
    assert tokenizer("a")["input_ids"][0] == 1, "this tokenizer adds one by itself"
    for ids in read[0]:
        assert (ids[0], ids.count(1)) == (1, 1)
        assert ids[-2:] == tuple(tokenizer("</s>\n", add_special_tokens=False)["input_ids"])


def test_a_long_answer_is_cut_and_counted_and_the_template_around_it_stays(folders: dict[str, Path]) -> None:
    row = from_texts(["why"], [["short", "a long answer " * 200]])[0]
    model = ranker(folders["llama"], max_length=60)
    read = model._read(row)
    assert not isinstance(read, str)
    assert [len(ids) <= 60 for ids in read[0]] == [True, True]
    assert read[0][0][-2:] == read[0][1][-2:]
    (ranking,) = model.rank([row])
    assert ranking.truncated == (False, True)
    # Without a setting, the model's own positions are the limit.
    assert ranker(folders["llama"]).rank(from_texts(["why"], [["snow " * 300, "b"]]))[0].truncated == (True, False)


def test_odd_prompts_get_an_error_of_their_own(folders: dict[str, Path]) -> None:
    rows = from_texts(["why " * 200, "why", "why"], [["a", "b"], [], ["a", "b"]])
    long, none, good = ranker(folders["llama"], max_length=50).rank(rows)
    assert (long.error, none.error, good.error) == (TOO_LONG, NO_CANDIDATES, None)
    assert ranker(folders["llama"]).rank([]) == []


def test_scores_that_are_not_finite_are_an_error_of_that_prompt_alone(folders: dict[str, Path]) -> None:
    model = ranker(folders["llama"])
    poison = load_tokenizer(str(folders["llama"]))("moon", add_special_tokens=False)["input_ids"][0]
    before = model.rank(ROWS[:1])
    model._model.get_input_embeddings().weight.data[poison] = float("nan")
    bad, good = model.rank([*from_texts(["why"], [["moon", "b"]]), ROWS[0]])
    assert bad.error == NOT_FINITE
    assert good.scores == pytest.approx(before[0].scores, abs=1e-5)


def test_equal_answers_tie_exactly(folders: dict[str, Path]) -> None:
    (ranking,) = ranker(folders["llama"]).rank(from_texts(["why"], [["a b", "c", "a b"]]))
    assert ranking.scores[0] == ranking.scores[2]
    assert ranking.ranks in ((1, 3, 1), (2, 1, 2))


def test_weights_of_lower_precision_are_computed_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = Path(shutil.copytree(folders["llama"], tmp_path / "half"))
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert ranker(folder)._model.dtype == torch.float32


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "lm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_labels": 1, "id2label": {"0": "reward"}}))
    with pytest.raises(DataError, match=r"lacks \['score.weight'\], which would be drawn at random"):
        ranker(folder)


def test_what_is_no_reward_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    two = llama(tmp_path / "two", num_labels=2)
    with pytest.raises(DataError, match="has 2 logits where a reward has one"):
        ranker(two)
    with pytest.raises(DataError, match="cannot be loaded"):
        ranker(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="dtype='fp32'"):
        ranker(folders["llama"], dtype="fp32")


def test_it_is_loaded_by_its_name(folders: dict[str, Path]) -> None:
    loaded = load_ranker(RankerConfig(ranker="reward_model"), {"ranker": str(folders["llama"])})
    assert isinstance(loaded, RewardModel)
