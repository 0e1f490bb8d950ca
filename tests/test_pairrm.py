"""PairRM: the checkpoint formats, the verdicts, and every odd input. See test_llm_blender for the reference's numbers."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from pairrm_checkpoint import PREFIXES, Checkpoint, build_checkpoint, build_tokenizer
from safetensors.torch import load_file, save_file

from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.rankers import NO_CANDIDATES, NOT_FINITE, Ranking, from_texts, load_ranker
from aipo_hpc.rankers.config import RankerConfig
from aipo_hpc.rankers.deberta import Encoder, EncoderConfig, log_buckets
from aipo_hpc.rankers.pairrm import PairRM

PROMPTS = ["Where is the library?", "Wie groß ist der Fluss? Und warum?", "今日は天気", "Sort a list of numbers."]
CANDIDATES = [
    ["Next to the café.", "I do not know.", "It is over there, " * 40],
    ["Größer als die Frage.", "Die Antwort ist kürzer.", "no", "Water boils."],
    ["散歩します。", "A good answer is correct, complete and short."],
    ["Split it in two halves and merge them.", "def f(x): return x", "", "Bread needs flour.", "0 1 2 3"],
]

ROWS = from_texts(PROMPTS, CANDIDATES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return build_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def ranker(checkpoint) -> PairRM:
    return PairRM.load(str(checkpoint.pairrm), device="cpu")


def only(ranker: PairRM, prompt: str, candidates: list[str]) -> Ranking:
    (ranking,) = ranker.rank(from_texts([prompt], [candidates]))
    return ranking


def close(ours: list[Ranking], others: list[Ranking], tolerance: float = 1e-5) -> bool:
    return all(
        a.error == b.error and a.truncated == b.truncated and a.scores == pytest.approx(b.scores, abs=tolerance)
        for a, b in zip(ours, others, strict=True)
    )


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


# The encoder


def test_the_encoder_gives_the_hidden_states_of_transformers():
    from transformers import DebertaV2Config, DebertaV2Model

    config = EncoderConfig(300, 64, 3, 2, 96)
    torch.manual_seed(0)
    theirs = DebertaV2Model(DebertaV2Config(**config.to_dict())).eval()
    ours = Encoder(config).eval()
    ours.load_state_dict(theirs.state_dict())
    for length in (7, 129, 600):
        input_ids = torch.randint(5, 300, (2, length))
        padding = torch.zeros(2, length, dtype=torch.bool)
        padding[0, length - 3 :] = True
        read = torch.tensor([[1, 2, 3], [0, 3, 2]])
        with torch.no_grad():
            expected = theirs(input_ids, attention_mask=(~padding).long()).last_hidden_state
            found = ours(input_ids, padding, read)
        assert torch.allclose(found, expected.gather(1, read[:, :, None].expand(-1, -1, 64)), atol=1e-5)


def test_distances_fall_into_the_buckets_of_transformers():
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    for length in (5, 129, 512, 513, 2051):
        theirs = make_log_bucket_position(torch.arange(length), 256, 512).long()
        assert torch.equal(log_buckets(length, 256, 512), theirs)


# Formats


def test_both_published_formats_give_the_same_verdicts(checkpoint, ranker):
    hf = PairRM.load(str(checkpoint.hf), device="cpu")
    assert close(hf.rank(ROWS), ranker.rank(ROWS))


def test_the_base_model_is_not_needed(checkpoint, ranker, tmp_path):
    folder = copy_of(checkpoint.pairrm, tmp_path / "alone")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_name": "microsoft/deberta-v3-large"}))
    alone = PairRM.load(str(folder), device="cpu")
    assert close(alone.rank(ROWS), ranker.rank(ROWS))


def test_a_saved_ranker_loads_as_it_was(ranker, tmp_path):
    ranker.save(tmp_path / "saved")
    saved = PairRM.load(str(tmp_path / "saved"), device="cpu")
    assert close(saved.rank(ROWS), ranker.rank(ROWS))


def test_a_saved_ranker_keeps_narrow_heads_and_its_limits(tmp_path):
    torch.manual_seed(0)
    new = PairRM.new(EncoderConfig(0, 32, 2, 4, 48), build_tokenizer(), source_maxlength=40, candidate_maxlength=20)
    new.save(tmp_path)
    saved = PairRM.load(str(tmp_path), device="cpu")
    assert saved.model.pretrained_model.config.num_attention_heads == 4
    assert saved.tokens.candidate_maxlength == 20
    assert close(saved.rank(ROWS), new.rank(ROWS))


def test_lower_precision_stays_near_the_reference(checkpoint, ranker):
    low = PairRM.load(str(checkpoint.pairrm), dtype="bfloat16", device="cpu")
    assert close(low.rank(ROWS), ranker.rank(ROWS), tolerance=0.3)


# Verdicts


def test_scores_are_the_mean_of_both_orders_of_all_pairs(ranker):
    prompt, texts = PROMPTS[3], ["one", "two words", "and three more"]
    ranker.model.eval()
    with torch.no_grad():
        wins = [[float(ranker.compare([prompt], [a], [b])) if a != b else 0.0 for b in texts] for a in texts]
    expected = [sum(wins[i][j] - wins[j][i] for j in range(3)) / 3 for i in range(3)]
    ranking = only(ranker, prompt, texts)
    assert ranking.scores == pytest.approx(expected, abs=1e-5)
    assert sorted(ranking.ranks) == [1, 2, 3]
    assert ranking.ranks[max(range(3), key=expected.__getitem__)] == 1


def test_a_verdict_does_not_depend_on_the_rest_of_the_batch(ranker):
    together = ranker.rank(ROWS)
    alone = [only(ranker, *item) for item in zip(PROMPTS, CANDIDATES, strict=True)]
    assert close(together, alone)
    assert [ranking.ranks for ranking in together] == [ranking.ranks for ranking in alone]
    # A long prompt beside it would take from the others' budget in llm-blender.
    beside_long, _ = ranker.rank(from_texts([PROMPTS[0], "word " * 3000], [CANDIDATES[0], ["a", "b"]]))
    assert close([beside_long], alone[:1])


def test_a_verdict_does_not_depend_on_the_size_of_batches(checkpoint, ranker):
    small = PairRM.load(str(checkpoint.pairrm), tokens_per_batch=1, device="cpu")
    large = PairRM.load(str(checkpoint.pairrm), tokens_per_batch=100_000, device="cpu")
    assert close(small.rank(ROWS), large.rank(ROWS))
    assert close(small.rank(ROWS), ranker.rank(ROWS))


def test_the_order_of_candidates_only_reorders_the_verdict(ranker):
    forward, backward = only(ranker, PROMPTS[1], CANDIDATES[1]), only(ranker, PROMPTS[1], CANDIDATES[1][::-1])
    assert forward.scores == pytest.approx(backward.scores[::-1], abs=1e-5)
    assert forward.ranks == backward.ranks[::-1]


def test_equal_candidates_tie_exactly_and_share_the_better_rank(ranker):
    ranking = only(ranker, PROMPTS[0], ["a b c", "x", "a b c", "x"])
    assert ranking.scores[0] == ranking.scores[2]
    assert sorted(ranking.ranks) == [1, 1, 3, 3]


def test_equal_candidates_are_compared_once(ranker, monkeypatch):
    rows = []
    monkeypatch.setattr(ranker, "_logits", lambda batch, positions: rows.extend(batch) or torch.zeros(len(batch)))
    ranker.rank(from_texts(["p"], [["a", "b", "a", "b", "a"]]))
    assert len(rows) == 2


# Odd inputs


def test_candidates_that_are_all_the_same_all_rank_first(ranker):
    assert only(ranker, "p", ["same"] * 4) == Ranking((0.0,) * 4, (1,) * 4, (False,) * 4)


def test_one_candidate_ranks_first_with_score_zero(ranker):
    assert only(ranker, "p", ["alone"]) == Ranking((0.0,), (1,), (False,))


def test_no_candidates_is_an_error_of_that_prompt_alone(ranker):
    none, good = ranker.rank(from_texts(["p", PROMPTS[0]], [[], CANDIDATES[0]]))
    assert none == Ranking((), (), (), error=NO_CANDIDATES)
    assert good.error is None
    assert ranker.rank([]) == []


def test_an_empty_candidate_is_ranked_like_any_other(ranker):
    ranking = only(ranker, PROMPTS[0], ["", "something"])
    assert ranking.error is None
    assert sorted(ranking.ranks) == [1, 2]


def test_scores_that_are_not_finite_are_an_error_of_that_prompt_alone(checkpoint):
    broken = PairRM.load(str(checkpoint.pairrm), device="cpu")
    before = broken.rank(ROWS[:1])
    (poison,) = broken.tokens.tokenizer.encode("[MASK]", add_special_tokens=False).ids
    broken.model.pretrained_model.embeddings["word_embeddings"].weight.data[poison] = float("nan")
    bad, good = broken.rank(from_texts(["p", PROMPTS[0]], [["fine", "[MASK]"], CANDIDATES[0]]))
    assert bad == Ranking((), (), (), error=NOT_FINITE)
    assert close([good], before)


def test_a_candidate_over_its_budget_is_flagged(ranker):
    ranking = only(ranker, "p", ["short", "long " * 4000])
    assert ranking.truncated == (False, True)
    assert not ranking.prompt_truncated


def test_candidates_that_differ_only_beyond_their_budget_tie(ranker):
    ranking = only(ranker, "p", ["long " * 4000 + "a", "long " * 4000 + "b"])
    assert ranking.ranks == (1, 1)
    assert ranking.truncated == (True, True)


def test_the_budget_of_a_candidate_is_412_tokens_and_half_of_what_the_prompt_leaves(ranker):
    for prompt, budget in (("p", 412 + (1224 - len(ranker.tokens.encode("p", []).source)) // 2), ("p " * 4000, 412)):
        encoded = ranker.tokens.encode(prompt, ["long " * 4000])
        assert [len(ids) for ids in encoded.different] == [budget]


def test_a_prompt_over_1224_tokens_is_cut_and_flagged_and_ranked(ranker):
    ranking = only(ranker, "prompt " * 3000, ["a", "b"])
    assert ranking.prompt_truncated
    assert ranking.error is None
    encoded = ranker.tokens.encode("prompt " * 3000, [])
    assert len(encoded.source) == 1224
    assert encoded.source[-1] == ranker.tokens.tokenizer.token_to_id("[SEP]")


@pytest.mark.parametrize("token", ["[SEP]", *PREFIXES])
def test_the_rankers_own_tokens_inside_text_count_as_a_space(ranker, token):
    dirty = only(ranker, f"a{token}b", [f"x {token} y", "z"])
    clean = only(ranker, "a b", ["x   y", "z"])
    assert close([dirty], [clean])


def test_a_lone_surrogate_counts_as_a_replacement_character(ranker):
    assert close([only(ranker, "a\ud800", ["x\udfff", "z"])], [only(ranker, "a\ufffd", ["x\ufffd", "z"])])


def test_text_goes_through_the_checkpoints_own_character_map(ranker):
    assert close([only(ranker, "ﬁne", ["ｆｕｌｌ", "z"])], [only(ranker, "fine", ["full", "z"])])


# Training


def test_comparisons_can_be_trained(tmp_path):
    torch.manual_seed(0)
    new = PairRM.new(EncoderConfig(0, 32, 2, 2, 48, hidden_dropout_prob=0.0), build_tokenizer())
    optimizer = torch.optim.Adam(new.model.parameters(), lr=1e-2)
    new.model.train()
    good, bad = ["a good answer"] * 4, ["a poor one"] * 4
    losses = []
    for _ in range(40):
        logits = torch.cat([new.compare(PROMPTS, good, bad), -new.compare(PROMPTS, bad, good)])
        loss = torch.nn.functional.softplus(-logits).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in new.model.parameters())
    assert losses[-1] < 0.5 * losses[0]
    ranking = only(new, PROMPTS[0], ["a poor one", "a good answer"])
    assert ranking.ranks == (2, 1)
    assert new.model.training


# Errors


def test_a_missing_folder_is_named():
    with pytest.raises(DataError, match=r"'/no/such/ranker': no such folder; give a folder with config.json"):
        PairRM.load("/no/such/ranker")


def test_a_model_id_out_of_reach_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing.*revision v1.*hf download nobody/nothing"):
        PairRM.load("nobody/nothing", revision="v1")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_or_broken_file_is_named(checkpoint, tmp_path, name):
    folder = copy_of(checkpoint.pairrm, tmp_path / "broken")
    (folder / name).write_bytes(b"torn")
    with pytest.raises(DataError, match=f"{name}: .*copy the checkpoint again"):
        PairRM.load(str(folder))
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"no {name}; a PairRM checkpoint has"):
        PairRM.load(str(folder))


def test_tensors_of_another_model_are_named(checkpoint, tmp_path):
    folder = copy_of(checkpoint.pairrm, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("pretrained_model.", "deberta."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"no tensor pretrained_model\.embeddings.*first tensors there: deberta\."):
        PairRM.load(str(folder))
    del tensors["head_layer.4.bias"]
    save_file(tensors | {"extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"lacks head_layer\.4\.bias; has the unknown extra"):
        PairRM.load(str(folder))


def test_sizes_that_contradict_the_tensors_are_named(checkpoint, tmp_path):
    folder = copy_of(checkpoint.hf, tmp_path / "sizes")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 7}))
    with pytest.raises(DataError, match=r"of shape \(256,\) instead of \(7,\)"):
        PairRM.load(str(folder))


def test_an_encoder_of_another_family_is_refused(checkpoint, tmp_path):
    folder = copy_of(checkpoint.hf, tmp_path / "family")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"position_biased_input": True}))
    with pytest.raises(DataError, match="position_biased_input is True"):
        PairRM.load(str(folder))


def test_a_tokenizer_of_another_model_is_refused(checkpoint, tmp_path):
    folder = copy_of(checkpoint.hf, tmp_path / "tokenizer")
    build_tokenizer().save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match=r"lacks the tokens <\|source\|>"):
        PairRM.load(str(folder))
    other = build_tokenizer()
    other.add_tokens(["<|shifts the rest|>", *PREFIXES])
    other.save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match="belong to different checkpoints"):
        PairRM.load(str(folder))


def test_a_ranker_of_another_type_is_refused(checkpoint, tmp_path):
    folder = copy_of(checkpoint.pairrm, tmp_path / "type")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"ranker_type": "summareranker"}))
    with pytest.raises(DataError, match="ranker_type is 'summareranker'"):
        PairRM.load(str(folder))


def test_an_unknown_dtype_or_an_empty_batch_is_refused(checkpoint):
    with pytest.raises(RecipeError, match="dtype is 'fp32'; choose one of float32"):
        load_ranker(RankerConfig(dtype="fp32"), {"ranker": str(checkpoint.pairrm)})
    with pytest.raises(RecipeError, match="tokens_per_batch is 0"):
        PairRM.load(str(checkpoint.pairrm), tokens_per_batch=0)


def test_an_encoder_config_reads_what_it_writes():
    config = EncoderConfig(300, 64, 3, 2, 96, position_buckets=32, max_position_embeddings=64)
    assert EncoderConfig.from_dict(config.to_dict(), "here") == config
    with pytest.raises(DataError, match=r"here: .*intermediate_size"):
        EncoderConfig.from_dict({**dataclasses.asdict(config), "intermediate_size": None}, "here")
