"""The rank stage on one shard: what it reads, writes, counts and continues."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pairrm_checkpoint import Checkpoint, build_checkpoint

from aipo_hpc.errors import DataError, RecipeError
from aipo_hpc.progress import PROGRESS
from aipo_hpc.rankers import NO_CANDIDATES, UNPARSABLE
from aipo_hpc.rankers.config import JudgeConfig, MemberConfig
from aipo_hpc.rankers.pairrm import PairRM
from aipo_hpc.rows import Candidate, Message, Ranked, Responses, read_rows, write_rows
from aipo_hpc.settings import content
from aipo_hpc.stages import rank
from aipo_hpc.stages.rank import RankConfig
from aipo_hpc.task import Input, Task


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return build_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def responses(number: int, texts: Sequence[str], error: str | None = None) -> Responses:
    prompt = f"Question {number}: why does water boil?"
    candidates = [Candidate(text, "stop", len(text)) for text in texts]
    return Responses(f"p{number}", prompt, [Message("user", prompt)], candidates, error)


def task(
    folder: Path, rows: Sequence[Responses], ranker: Path, attempt: int = 1, earlier: tuple[Path, ...] = ()
) -> Task:
    generated, out = folder / "generated", folder / f"attempt-{attempt}"
    for path in (generated, out):
        path.mkdir(exist_ok=True)
    write_rows(generated / "rows.parquet", rows, Responses)
    inputs = {"responses": Input(shards={3: (generated / "rows.parquet",)}), "ranker": Input(value=str(ranker))}
    return Task("iter-00/rank", 0, 3, 8, 0, inputs, out, earlier)


def ranked(out: Path) -> list[Ranked]:
    return list(read_rows([out / "rows.parquet"], Ranked))


def count_prompts(monkeypatch, die_after: int | None = None) -> list[str]:
    """Record the prompts that reach the ranker; die when that many would be exceeded."""
    seen: list[str] = []
    original = PairRM.rank

    def spy(self, rows):
        if die_after is not None and len(seen) + len(rows) > die_after:
            raise KeyboardInterrupt
        seen.extend(row.prompt for row in rows)
        return original(self, rows)

    monkeypatch.setattr(PairRM, "rank", spy)
    return seen


def test_rows_keep_the_inputs_order_and_carry_scores_and_ranks(checkpoint, tmp_path):
    rows = [responses(number, ["It is hot.", "no", "The pressure is low."]) for number in range(5)]
    job = task(tmp_path, rows, checkpoint.pairrm)
    outcome = rank.run(RankConfig(), job)
    assert outcome.outputs == ("rows.parquet",)
    assert outcome.rows == 5
    found = ranked(job.out)
    assert [row.prompt_id for row in found] == [row.prompt_id for row in rows]
    expected = PairRM.load(str(checkpoint.pairrm)).rank(rows)
    for row, source, ranking in zip(found, rows, expected, strict=True):
        assert (row.prompt, row.messages, row.candidates) == (source.prompt, source.messages, source.candidates)
        assert row.scores == pytest.approx(list(ranking.scores), abs=1e-5)
        assert row.ranks == list(ranking.ranks)


def test_every_oddity_is_counted_and_none_stops_the_shard(checkpoint, tmp_path):
    rows = [
        responses(0, ["a", "b"]),
        responses(1, [], error="prompt longer than the model's context"),
        responses(2, []),
        responses(3, ["alone"]),
        responses(4, ["same", "same", "same"]),
        responses(5, ["", "  ", "text"]),
        responses(6, ["fine", "long " * 3000]),
    ]
    job = task(tmp_path, rows, checkpoint.pairrm)
    counts = rank.run(RankConfig(), job).counts
    assert counts == {
        "prompts": 7,
        "ranked": 5,
        "errors": 2,
        "non_finite": 0,
        "candidates": 11,
        "truncated_candidates": 1,
        "truncated_prompts": 0,
        "empty_candidates": 2,
        "identical": 1,
        "single": 1,
    }
    found = ranked(job.out)
    assert [row.error for row in found[1:3]] == ["prompt longer than the model's context", NO_CANDIDATES]
    assert found[1].scores == found[1].ranks == []
    assert found[3].ranks == [1]
    assert found[4].ranks == [1, 1, 1]
    assert found[6].truncated == [False, True]


def test_scores_that_are_not_finite_are_counted(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(PairRM, "_logits", lambda self, rows, positions: torch.full((len(rows),), float("nan")))
    job = task(tmp_path, [responses(0, ["a", "b"])], checkpoint.pairrm)
    counts = rank.run(RankConfig(), job).counts
    assert (counts["non_finite"], counts["errors"], counts["ranked"]) == (1, 1, 0)


def test_long_candidates_as_models_write_them_are_reported_as_truncated(checkpoint, tmp_path):
    step = "First, bring the water to a boil; then lower the heat, add salt, and stir until the flour is smooth. "
    rows = [responses(number, [step * 2, step * (20 + number), step * 60]) for number in range(3)]
    job = task(tmp_path, rows, checkpoint.pairrm)
    counts = rank.run(RankConfig(), job).counts
    found = ranked(job.out)
    assert [row.truncated[0] for row in found] == [False] * 3
    assert [row.truncated[2] for row in found] == [True] * 3
    assert counts["truncated_candidates"] == sum(sum(row.truncated) for row in found)


def test_a_second_attempt_continues_where_the_first_was_killed(checkpoint, tmp_path, monkeypatch):
    rows = [responses(number, [f"answer {number}", "no"]) for number in range(40)]
    whole = task(tmp_path, rows, checkpoint.pairrm, attempt=0)
    counts = rank.run(RankConfig(), whole).counts

    first = task(tmp_path, rows, checkpoint.pairrm, attempt=1)
    with monkeypatch.context() as patch:
        seen_first = count_prompts(patch, die_after=20)
        with pytest.raises(KeyboardInterrupt):
            rank.run(RankConfig(), first)
    assert not (first.out / "rows.parquet").exists()
    with (first.out / PROGRESS).open("a") as torn:
        torn.write('{"prompt_id": "p39", "prom')

    second = task(tmp_path, rows, checkpoint.pairrm, attempt=2, earlier=(first.out,))
    with monkeypatch.context() as patch:
        seen_second = count_prompts(patch)
        outcome = rank.run(RankConfig(), second)
    assert 0 < len(seen_first) < 40
    assert seen_first + seen_second == [row.prompt for row in rows]
    assert outcome.counts == counts
    for row, uninterrupted in zip(ranked(second.out), ranked(whole.out), strict=True):
        assert (row.prompt_id, row.ranks) == (uninterrupted.prompt_id, uninterrupted.ranks)
        assert row.scores == pytest.approx(uninterrupted.scores, abs=1e-5)


def test_an_attempt_with_nothing_left_to_rank_loads_no_ranker(tmp_path):
    rows = [responses(0, [], error="no answer")]
    job = task(tmp_path, rows, tmp_path / "no-such-ranker")
    assert rank.run(RankConfig(), job).counts["errors"] == 1
    empty = task(tmp_path, [], tmp_path / "no-such-ranker", attempt=2)
    assert rank.run(RankConfig(), empty).rows == 0
    assert ranked(empty.out) == []


def test_the_ranker_comes_from_the_input_not_from_the_settings(checkpoint, tmp_path):
    job = task(tmp_path, [responses(0, ["a", "b"])], checkpoint.pairrm)
    assert rank.run(RankConfig(model_name_or_path="/not/read"), job).rows == 1


def test_a_wrong_ranker_or_checkpoint_stops_the_shard(checkpoint, tmp_path):
    rows = [responses(0, ["a", "b"])]
    with pytest.raises(RecipeError, match="did you mean 'pairrm'"):
        rank.run(RankConfig(ranker="pair-rm"), task(tmp_path, rows, checkpoint.pairrm))
    with pytest.raises(DataError, match="no such folder"):
        rank.run(RankConfig(), task(tmp_path, rows, tmp_path / "nowhere", attempt=2))


def test_batch_size_and_resources_do_not_decide_content():
    assert content(RankConfig(tokens_per_batch=7)) == content(RankConfig())
    assert content(RankConfig(dtype="bfloat16")) != content(RankConfig())
    assert "resources" not in content(RankConfig())


def test_an_ensemble_keeps_every_members_scores_and_a_judge_its_replies(checkpoint, tiny_model, tmp_path):
    asked = JudgeConfig(engine="transformers", dtype="float32", num_samples=1, max_tokens=4, max_prompt_tokens=1500)
    twins = (MemberConfig("pairrm"), MemberConfig("pairrm", name="twin"))
    rows = [responses(number, ["It is hot.", "no", "The pressure is low."]) for number in range(3)]
    job = task(tmp_path, rows, checkpoint.pairrm)
    several = {f"ranker.{name}": Input(value=str(checkpoint.pairrm)) for name in ("pairrm", "twin")}
    inputs = {"responses": job.inputs["responses"], **several, "ranker.judge": Input(value=str(tiny_model))}
    outcome = rank.run(RankConfig("ensemble", members=twins), dataclasses.replace(job, inputs=inputs))
    alone = PairRM.load(str(checkpoint.pairrm)).rank(rows)
    for row, ranking in zip(ranked(job.out), alone, strict=True):
        assert [said.ranker for said in row.opinions] == ["pairrm", "twin"]
        assert all(said.scores == pytest.approx(list(ranking.scores), abs=1e-5) for said in row.opinions)
        assert row.ranks == list(ranking.ranks)
    assert "replies" not in outcome.counts

    second = task(tmp_path, rows, checkpoint.pairrm, attempt=2)
    members = (twins[0], MemberConfig("judge", judge=asked))
    mixed = rank.run(RankConfig("ensemble", members=members), dataclasses.replace(second, inputs=inputs))
    counted = {name: mixed.counts[name] for name in ("ranked", "errors", "replies", "unparsable")}
    assert counted == {"ranked": 0, "errors": 3, "replies": 9, "unparsable": 9}
    for row in ranked(second.out):
        assert row.error == f"judge: {UNPARSABLE}"
        assert (len(row.opinions[0].scores), row.opinions[1].scores, row.opinions[1].replies) == (3, [], 3)


def test_what_was_ranked_together_stays_together_after_a_kill(checkpoint, tmp_path, monkeypatch):
    rows = [responses(number, [f"answer {number}", "no"]) for number in range(20)]
    first = task(tmp_path, rows, checkpoint.pairrm)
    rank.run(RankConfig(), first)
    lines = (first.out / PROGRESS).read_text().splitlines(keepends=True)
    (first.out / PROGRESS).write_text("".join(lines[:3]))
    (first.out / "rows.parquet").unlink()
    second = task(tmp_path, rows, checkpoint.pairrm, attempt=2, earlier=(first.out,))
    seen = count_prompts(monkeypatch)
    rank.run(RankConfig(), second)
    assert seen == [row.prompt for row in rows], "batches are those of an undisturbed shard"
    assert len((second.out / PROGRESS).read_text().splitlines()) == 20
