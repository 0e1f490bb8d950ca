"""The pairs stage: which candidates become a pair, which prompts are dropped and why."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_tokenizer_folder

from aipo_hpc.chat import load_tokenizer, prompt_ids
from aipo_hpc.errors import DataError, GuardStop
from aipo_hpc.filters import unfit
from aipo_hpc.guard import GuardConfig
from aipo_hpc.rows import PROMPT_TOO_LONG, Candidate, KeptOut, Message, Pair, Ranked, read_rows, write_rows
from aipo_hpc.selection import choose
from aipo_hpc.settings import content
from aipo_hpc.stages import pairs
from aipo_hpc.stages.pairs import Dropped, MixConfig, PairsConfig
from aipo_hpc.task import Input, Task


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_folder(tmp_path_factory.mktemp("policy"))


def candidate(text: str, num_tokens: int = 5, finish_reason: str = "stop") -> Candidate:
    return Candidate(text, finish_reason, num_tokens)


def ranked(
    texts: Sequence[str], ranks: Sequence[int], *, prompt_id: str = "p0", prompt: str = "why", error: str | None = None
) -> Ranked:
    scores = [-float(rank) for rank in ranks]
    candidates = [candidate(text) for text in texts]
    return Ranked(
        prompt_id, prompt, [Message("user", prompt)], candidates, scores, list(ranks), [False] * len(texts), error
    )


def pair(chosen: Candidate, rejected: Candidate, margin: float = 1.0) -> Pair:
    return Pair("p0", "why", [Message("user", "why")], chosen, rejected, margin, 0.0)


def run(folder: Path, rows: Sequence[Ranked], policy: Path, config: PairsConfig | None = None, **more: Input) -> Task:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "out").mkdir(exist_ok=True)
    write_rows(folder / "rows.parquet", rows, Ranked)
    inputs = {"ranked": Input(shards={0: (folder / "rows.parquet",)}), "policy": Input(value=str(policy)), **more}
    task = Task("iter-02/pairs", 2, 0, 1, 7, inputs, folder / "out")
    outcome = pairs.run(config or PairsConfig(), task)
    assert outcome.outputs == (
        "pairs.parquet",
        "own.parquet",
        "unfiltered.parquet",
        "dropped.parquet",
        "statistics.json",
    )
    dropped = list(read_rows([task.out / pairs.DROPPED], Dropped))
    assert outcome.rows == len(list(read_rows([task.out / pairs.PAIRS], Pair)))
    assert outcome.counts["kept"] == len(list(read_rows([task.out / pairs.OWN_PAIRS], Pair)))
    assert outcome.counts["added"] == outcome.rows - outcome.counts["kept"]
    own = [drop for drop in dropped if drop.source == pairs.OWN]
    assert sum(value for name, value in outcome.counts.items() if name.startswith("dropped_")) == len(own)
    return task


@pytest.mark.parametrize(
    ("texts", "ranks", "chosen", "rejected"),
    [
        (["a", "b", "c"], [2, 1, 3], "b", "c"),
        (["a", "b", "c", "d"], [1, 1, 3, 3], "a", "c"),  # of equals, the first
        (["a", "b"], [2, 1], "b", "a"),
    ],
)
def test_the_best_candidate_is_chosen_and_the_worst_rejected(texts, ranks, chosen, rejected):
    found = choose(ranked(texts, ranks))
    assert isinstance(found, Pair)
    assert (found.chosen.response, found.rejected.response) == (chosen, rejected)
    assert (found.chosen_score, found.rejected_score) == (-float(min(ranks)), -float(max(ranks)))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ranked([], [], error=f"{PROMPT_TOO_LONG}: 900 tokens is longer than ..."), "prompt_too_long"),
        (ranked([], [], error="chat template: no user turn"), "not_generated"),
        (ranked(["a", "b"], [], error="scores are not finite"), "not_ranked"),
        (ranked(["a"], [1]), "single_candidate"),
        (ranked(["a", "b", "c"], [1, 1, 1]), "tie"),
        (ranked(["a", " a\n", "a"], [1, 3, 2]), "identical"),
    ],
)
def test_a_prompt_without_a_best_and_a_worst_answer_has_a_reason(row, reason):
    assert choose(row) == reason


@pytest.mark.parametrize(
    ("found", "config", "reason"),
    [
        (pair(candidate("good"), candidate("bad")), PairsConfig(), None),
        (pair(candidate(" \n"), candidate("bad")), PairsConfig(), "empty_chosen"),
        (pair(candidate("good"), candidate("")), PairsConfig(), None),  # an empty answer is a bad one, and may be shown
        (pair(candidate("good", 9), candidate("bad")), PairsConfig(max_response_tokens=8), "response_too_long"),
        (pair(candidate("good"), candidate("bad", 9)), PairsConfig(max_response_tokens=8), "response_too_long"),
        (pair(candidate("good", 8), candidate("bad", 8)), PairsConfig(max_response_tokens=8), None),
        (pair(candidate("see HTTPS://a.b"), candidate("bad")), PairsConfig(), "url_in_chosen"),
        (pair(candidate("see www.a.b"), candidate("bad")), PairsConfig(), "url_in_chosen"),
        (pair(candidate("see www.a.b"), candidate("bad")), PairsConfig(drop_url_in_chosen=False), None),
        (pair(candidate("good"), candidate("http://a.b")), PairsConfig(), None),
        (pair(candidate("good"), candidate("http://a.b")), PairsConfig(drop_url_in_rejected=True), "url_in_rejected"),
        (pair(candidate("the www. prefix, http:"), candidate("bad")), PairsConfig(), None),
    ],
)
def test_pairs_are_filtered_by_their_texts_and_lengths(found, config, reason):
    assert unfit(found, config) == reason


def test_every_prompt_becomes_a_pair_or_is_dropped_with_its_reason(policy, tmp_path):
    long_prompt = "why " * 40
    rows = [
        ranked(["good", "fair", "bad"], [1, 2, 3], prompt_id="kept"),
        ranked([], [], prompt_id="not_generated", error="chat template: no user turn"),
        ranked(["a", "b"], [], prompt_id="not_ranked", error="scores are not finite"),
        ranked(["a"], [1], prompt_id="single_candidate"),
        ranked(["a", "b"], [1, 1], prompt_id="tie"),
        ranked(["a", "a "], [1, 2], prompt_id="identical"),
        ranked(["", "b"], [1, 2], prompt_id="empty_chosen"),
        ranked(["http://a.b", "b"], [1, 2], prompt_id="url_in_chosen"),
        ranked(["a", "http://a.b"], [1, 2], prompt_id="url_in_rejected"),
        ranked(["a", "b"], [1, 2], prompt_id="prompt_too_long", prompt=long_prompt),
        replace(
            ranked(["a", "b"], [1, 2], prompt_id="response_too_long"), candidates=[candidate("a"), candidate("b", 99)]
        ),
    ]
    limits = PairsConfig(max_prompt_tokens=30, max_response_tokens=50, drop_url_in_rejected=True)
    task = run(tmp_path, rows, policy, limits)
    dropped = list(read_rows([task.out / pairs.DROPPED], Dropped))
    print(f"one prompt dropped for each of: {', '.join(drop.reason for drop in dropped)}")
    assert [drop.prompt_id for drop in dropped] == [drop.reason for drop in dropped]
    assert [drop.reason for drop in dropped] == [row.prompt_id for row in rows[1:]]
    (kept,) = read_rows([task.out / pairs.PAIRS], Pair)
    assert (kept.prompt_id, kept.chosen.response, kept.rejected.response) == ("kept", "good", "bad")


def test_the_longest_prompt_is_measured_with_its_chat_template(policy, tmp_path):
    messages = [Message("user", "what is the moon")]
    length = len(prompt_ids(load_tokenizer(str(policy)), messages))
    rows = [ranked(["a", "b"], [1, 2], prompt=messages[0].content)]
    run(tmp_path / "fits", rows, policy, PairsConfig(max_prompt_tokens=length))
    with pytest.raises(DataError, match="'prompt_too_long': 1"):
        run(tmp_path / "longer", rows, policy, PairsConfig(max_prompt_tokens=length - 1))


def test_statistics_are_those_of_the_kept_pairs():
    kept = [
        pair(candidate("four", 4), candidate("to", 2, "length"), margin=1.0),
        pair(candidate("sevenup", 7, "length"), candidate("fourteen chars", 12, "length"), margin=0.5),
    ]
    assert pairs.describe(kept, {"tie": 3}) == {
        "kept": 2,
        "dropped": {"tie": 3},
        "chosen": {"mean_tokens": 5.5, "mean_characters": 5.5, "truncated": 1},
        "rejected": {"mean_tokens": 7.0, "mean_characters": 8.0, "truncated": 2},
        "mean_margin": 0.75,
        "chosen_longer": 0.5,
    }


def test_statistics_are_written_beside_the_pairs(policy, tmp_path):
    rows = [
        ranked(["good", "bad"], [1, 2]),
        ranked(["a", "b"], [1, 1], prompt_id="p1"),
        ranked(["c"], [1], prompt_id="p2"),
    ]
    task = run(tmp_path, rows, policy)
    statistics = json.loads((task.out / pairs.STATISTICS).read_text())
    assert (statistics["kept"], statistics["dropped"]) == (1, {"single_candidate": 1, "tie": 1})


def test_no_pair_left_is_an_error_with_the_reasons_and_the_way_out(policy, tmp_path):
    rows = [ranked(["a", "b"], [1, 1], prompt_id=f"p{number}") for number in range(3)] + [ranked(["c"], [1])]
    with pytest.raises(DataError) as raised:
        run(tmp_path, rows, policy)
    message = str(raised.value)
    print(message)
    assert message.startswith(
        "iter-02/pairs: no pair is left of 4 prompts; dropped: {'single_candidate': 1, 'tie': 3}."
    )
    assert "generate.temperature" in message


def test_what_is_kept_is_content_and_the_jobs_resources_are_not():
    assert content(PairsConfig(max_prompt_tokens=8)) != content(PairsConfig())
    assert "resources" not in content(PairsConfig())


def test_what_the_filters_take_is_in_the_unfiltered_pairs_and_the_smallest_margins_go_last(policy, tmp_path):
    rows = [ranked(["good", "bad"], [1, 1 + number], prompt_id=f"p{number}") for number in range(5)]
    rows.append(ranked(["see www.x.org", "bad"], [1, 2], prompt_id="url"))
    task = run(tmp_path, rows, policy, PairsConfig(min_margin_quantile=0.5))
    assert [row.prompt_id for row in read_rows([task.out / pairs.UNFILTERED], Pair)] == ["p1", "p2", "p3", "p4", "url"]
    assert [row.prompt_id for row in read_rows([task.out / pairs.PAIRS], Pair)] == ["p3", "p4"]
    assert list(read_rows([task.out / pairs.DROPPED], Dropped)) == [
        Dropped("p0", "tie"),
        Dropped("url", "url_in_chosen"),
        Dropped("p1", "margin_quantile"),
        Dropped("p2", "margin_quantile"),
    ]


def stored(path: Path, rows: Sequence[object], kind: type) -> Input:
    write_rows(path, rows, kind)
    return Input(shards={0: (path,)})


def test_a_prompt_that_holds_a_benchmarks_is_dropped_with_where_that_is_from(policy, tmp_path):
    asked = "name three rivers of the far north please"
    rows = [
        ranked(["good", "bad"], [1, 2], prompt_id="seen", prompt=f"now {asked} and lakes"),
        ranked(["good", "bad"], [1, 2], prompt_id="near", prompt="name three rivers of spain"),
    ]
    listed = stored(tmp_path / "listed.parquet", [KeptOut("arena.jsonl row 7", asked)], KeptOut)
    config = PairsConfig(decontaminate_ngram=4, decontaminate_overlap=0.6)
    task = run(tmp_path, rows, policy, config, kept_out=listed)
    assert list(read_rows([task.out / pairs.DROPPED], Dropped)) == [
        Dropped("seen", "contaminated", "own", "arena.jsonl row 7, 1.00 of it")
    ]
    # "name three rivers of": four words of eight.
    half = replace(config, decontaminate_overlap=0.5)
    with pytest.raises(DataError, match="'contaminated': 2"):
        run(tmp_path / "half", rows, policy, half, kept_out=listed)


def mixed(folder: Path, policy: Path) -> Task:
    """Two own pairs; half of four of the iteration before, a quarter of four of that before it; the end of a dataset."""
    folder.mkdir()
    earlier = {
        f"earlier.{back}": stored(
            folder / f"earlier{back}.parquet",
            [replace(pair(candidate(f"good {back}"), candidate("bad")), prompt_id=f"p{number}") for number in range(4)],
            Pair,
        )
        for back in (1, 2)
    }
    texts = [["fine", "poor"], ["fine", "poor", "poorer"], ["http://a.b", "poor"], ["same", "same"]]
    rows = [
        replace(ranked(each, range(len(each)), prompt_id=f"p{number}"), scores=[0.1, 0.0, -0.1][: len(each)])
        for number, each in enumerate(texts)
    ]
    config = PairsConfig(
        accumulate=(0.5, 0.25),
        mix=(MixConfig(name="uf", ratio=0.75, keep="keep_end"),),
        min_margin=0.5,
    )
    own = [ranked(["good", "bad"], [1, 2], prompt_id=f"p{number}") for number in range(2)]
    dataset = {"mixed.0": stored(folder / "uf.parquet", rows, Ranked)}
    return run(folder, own, policy, config, **earlier, **dataset)


def test_pairs_of_earlier_iterations_and_of_datasets_are_mixed_in_by_ratio_with_their_source(policy, tmp_path):
    task = mixed(tmp_path / "one", policy)
    found = list(read_rows([task.out / pairs.PAIRS], Pair))
    assert [row.source for row in found] == ["own", "own", "iter-01", "iter-01", "iter-00", "uf"]
    assert len({row.prompt_id for row in found}) == len(found), "ids stay unique: an iteration may ask again"
    assert all(row.prompt_id == f"p{row.prompt_id[1]}@{row.source}" for row in found[2:5])
    assert {row.chosen.response for row in found[2:4]} == {"good 1"} and found[4].chosen.response == "good 2"
    assert (found[5].prompt_id, found[5].rejected.response) == ("p1@uf", "poorer"), "no margin is asked of a dataset"
    assert [row.prompt_id for row in read_rows([task.out / pairs.OWN_PAIRS], Pair)] == ["p0", "p1"]
    assert list(read_rows([task.out / pairs.DROPPED], Dropped)) == [
        Dropped("p2@uf", "url_in_chosen", "uf"),
        Dropped("p3@uf", "identical", "uf"),
    ]
    statistics = json.loads((task.out / pairs.STATISTICS).read_text())
    assert {name: each["kept"] for name, each in statistics["sources"].items()} == {
        "own": 2,
        "iter-01": 2,
        "iter-00": 1,
        "uf": 1,
    }
    assert statistics["sources"]["uf"]["dropped"] == {"identical": 1, "url_in_chosen": 1}
    assert statistics["sources"]["uf"]["mean_margin"] == pytest.approx(0.2)
    assert statistics["kept"] == 6


def test_the_same_inputs_give_the_same_bytes(policy, tmp_path):
    one, other = mixed(tmp_path / "one", policy), mixed(tmp_path / "other", policy)
    for name in (pairs.PAIRS, pairs.OWN_PAIRS, pairs.UNFILTERED, pairs.DROPPED, pairs.STATISTICS):
        assert (one.out / name).read_bytes() == (other.out / name).read_bytes()


def test_a_value_beyond_its_stop_threshold_ends_the_job_and_a_raised_threshold_lets_it_go_on(policy, tmp_path):
    rows = [ranked(["good", "bad"], [1, 2]), ranked(["a", "b"], [1, 1], prompt_id="p1")]
    with pytest.raises(GuardStop) as raised:
        run(tmp_path / "stopped", rows, policy, PairsConfig(guard=GuardConfig(warn_tie_rate=0.3, stop_tie_rate=0.4)))
    print(raised.value)
    assert str(raised.value).startswith(
        "iter-02/pairs: the guard stopped the run: tie_rate 0.500 is above guard.stop_tie_rate=0.4."
    )
    assert "guard.stop_tie_rate=..." in str(raised.value) and "generate.temperature" in str(raised.value)
    assert not (tmp_path / "stopped" / "out" / pairs.PAIRS).exists()
    task = run(tmp_path / "raised", rows, policy, PairsConfig(guard=GuardConfig(warn_tie_rate=0.3, stop_tie_rate=0.5)))
    assert json.loads((task.out / pairs.STATISTICS).read_text())["guard"]["tie_rate"] == 0.5


def test_a_value_beyond_its_warn_threshold_is_told_and_nothing_else(policy, tmp_path, capsys):
    run(tmp_path, [ranked(["good", "bad"], [1, 2])], policy, PairsConfig(guard=GuardConfig(warn_length_gap=-0.5)))
    assert "guard: length_gap 0.000 is above guard.warn_length_gap=-0.5" in capsys.readouterr().out
