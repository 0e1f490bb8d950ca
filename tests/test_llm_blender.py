"""Our PairRM against its authors' package, on the same checkpoint."""

import importlib.util
import sys

import pytest
from pairrm_checkpoint import Checkpoint, build_checkpoint

from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.rankers import Ranker, Ranking, from_texts, load_ranker
from aipo_hpc.rankers.config import RankerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:dataclasses_json"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ENGLISH = (
    ["Where is the library?", "How do I sort a list of numbers?", "Why does water boil?", "word " * 2000],
    [
        ["Next to the café.", "I do not know.", "It is over there. " * 300, ""],
        ["Split it, sort each half, merge.", "Split it, sort each half, merge.", "No."],
        ["Because it is hot.", "The pressure of the air is lower on a mountain.", "0 1 2", "[CLS] hm", "<|source|> x"],
        ["short", "long " * 1000],
    ],
)
NON_ASCII = (
    ["Wie groß ist der Fluss?", "今日は天気がいいので", "Быстрая лиса [SEP] прыгает?", "Ελληνικά ﬁ ｆｕｌｌ"],
    [
        ["Größer als die Frage.", "Über den Flüssen wird es kühler.", "½ ﬁve"],
        ["散歩します。", "水在一百度时沸腾。", "Où est la bibliothèque?\n\tÀ côté."],
        ["через ленивую собаку", "ｆｕｌｌ ｗｉｄｔｈ", "🙂 emoji", "\ud83d alone"],
        ["γράμματα", "και  αριθμοί ", "e\u0301 and é"],
    ],
)

needs_llm_blender = pytest.mark.skipif(
    importlib.util.find_spec("llm_blender") is None, reason="needs the extra llm-blender"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return build_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=1)


def loaded(name: str, folder: str, **settings: str) -> Ranker:
    return load_ranker(RankerConfig(ranker=name, **settings), {"ranker": folder})


def assert_same(ours: list[Ranking], theirs: list[Ranking]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.error, a.truncated, a.prompt_truncated) == (b.error, b.truncated, b.prompt_truncated)
        assert a.scores == pytest.approx(b.scores, abs=1e-4)
        for i, (rank, other) in enumerate(zip(a.ranks, b.ranks, strict=True)):
            near = sum(abs(score - a.scores[i]) < 1e-5 for score in a.scores) - 1
            assert abs(rank - other) <= near


@needs_llm_blender
@pytest.mark.parametrize("texts", [ENGLISH, NON_ASCII], ids=["english", "non-ascii"])
def test_ranks_and_scores_are_those_of_llm_blender(checkpoint, texts):
    ours = loaded("pairrm", str(checkpoint.pairrm)).rank(from_texts(*texts))
    theirs = loaded("llm_blender", str(checkpoint.pairrm)).rank(from_texts(*texts))
    assert_same(ours, theirs)
    assert len({rank for ranking in ours for rank in ranking.ranks}) > 2


@needs_llm_blender
def test_llm_blender_reads_what_we_save(checkpoint, tmp_path):
    ours = loaded("pairrm", str(checkpoint.pairrm))
    ours.save(tmp_path / "saved")
    theirs = loaded("llm_blender", str(tmp_path / "saved"))
    assert_same(ours.rank(from_texts(*NON_ASCII)), theirs.rank(from_texts(*NON_ASCII)))


@needs_llm_blender
def test_odd_inputs_get_the_same_answers_from_both(checkpoint):
    odd = (["p", "p", "p"], [[], ["alone"], ["same", "same"]])
    assert_same(
        loaded("pairrm", str(checkpoint.pairrm)).rank(from_texts(*odd)),
        loaded("llm_blender", str(checkpoint.pairrm)).rank(from_texts(*odd)),
    )


def test_without_the_package_the_error_names_the_extra(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_blender", None)
    with pytest.raises(RecipeError, match=r"install aipo_hpc\[llm-blender\]"):
        loaded("llm_blender", str(checkpoint.pairrm))


@needs_llm_blender
def test_the_reference_refuses_what_it_cannot_do(checkpoint):
    with pytest.raises(RecipeError, match="float32 only"):
        loaded("llm_blender", str(checkpoint.pairrm), dtype="bfloat16")
    with pytest.raises(DataError, match="PairRM-hf format"):
        loaded("llm_blender", str(checkpoint.hf))
