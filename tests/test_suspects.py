"""Prompts that kill their worker: the narrowing as tables, and real processes that really die."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aipo_hpc.errors import DataError
from aipo_hpc.launch import launch
from aipo_hpc.recipe import Recipe
from aipo_hpc.record import read_graph
from aipo_hpc.report import print_report
from aipo_hpc.rows import Ranked, Responses, read_rows
from aipo_hpc.store import Run
from aipo_hpc.suspects import Suspects, Suspicion, in_flight, narrow
from aipo_hpc.task import Task


@pytest.mark.parametrize(
    ("flights", "groups", "guilty"),
    [
        ([], [], ""),
        (["abcd"], [], ""),
        (["abcd", ""], [], ""),
        (["abcd", "efgh"], [], ""),
        (["abcd", "abcd"], ["ab", "cd"], ""),
        (["abcd", "cdef"], ["c", "d"], ""),
        (["abcd", "abcd", "cd"], ["ab", "c", "d"], ""),
        (["abcd", "abcd", "cd", "d"], ["ab", "c", "d"], ""),
        (["abcd", "abcd", "cd", "d", "d"], ["ab", "c"], "d"),
        (["abcd", "abcd", "cd", "ef", "d", "d"], ["ab", "c"], "d"),
        (["a", "a"], [], "a"),
        (["ab", "ab", "a", "a", "b", "b"], [], "ab"),
        (["abcdefg", "abcdefg"], ["abcd", "efg"], ""),
    ],
)
def test_what_was_in_flight_at_the_deaths_is_narrowed_down(flights: list[str], groups: list[str], guilty: str) -> None:
    assert narrow(flights) == Suspicion(tuple(tuple(group) for group in groups), tuple(guilty))


@pytest.mark.parametrize("poison", ["a", "g", "p"])
def test_one_poison_among_many_is_found_in_few_deaths_and_no_other_is_blamed(poison: str) -> None:
    """Plays the attempts: each finishes the groups before the one that holds the poison, then dies."""
    flights: list[str] = []
    finished: set[str] = set()
    while poison not in narrow(flights).guilty:
        suspicion = narrow(flights)
        rounds = ["".join(group) for group in suspicion.groups] if suspicion.groups else ["abcdefghijklmnop"]
        for group in rounds:
            if poison in group:
                flights.append("".join(each for each in group if each not in finished))
                break
            finished |= set(group)
    print(f"{poison}: {len(flights)} deaths to find it among 16")
    assert narrow(flights).guilty == (poison,) and len(flights) <= 8


def task(folder: Path, *deaths: Path) -> Task:
    out = folder / f"attempt-{len(deaths)}"
    out.mkdir(parents=True, exist_ok=True)
    return Task("iter-00/generate", 0, 0, 1, 0, {}, out, deaths, deaths)


def died_with(folder: Path, name: str, begun: str, finished: str = "") -> Path:
    attempt = folder / name
    attempt.mkdir()
    (attempt / "in-flight.jsonl").write_text("".join(json.dumps(each) + "\n" for each in begun) + '"tor')
    (attempt / "progress.jsonl").write_text("".join(json.dumps({"prompt_id": each}) + "\n" for each in finished))
    return attempt


def test_what_an_attempt_had_begun_and_not_finished_was_in_flight(tmp_path: Path) -> None:
    assert in_flight(died_with(tmp_path, "one", "abcd", "ac")) == ["b", "d"]
    assert in_flight(tmp_path / "nothing") == []


def test_calls_are_known_by_their_first_field_as_prompts_are(tmp_path: Path) -> None:
    attempt = died_with(tmp_path, "one", "ab")
    (attempt / "progress.jsonl").write_text('{"call_id": "a", "cluster": -1}\n')
    assert in_flight(attempt) == ["b"]


def test_rounds_begin_suspects_last_and_keep_other_batches_whole(tmp_path: Path) -> None:
    deaths = [died_with(tmp_path, name, "efgh") for name in ("one", "two")]
    suspects = Suspects(task(tmp_path, *deaths))
    batches = ["abcd", "efgh", "ijkl"]
    assert suspects.rounds(batches, "ab") == [[list("abcd"), list("ijkl")], [list("ef")], [list("gh")]]
    assert suspects.rounds(batches, "abcdefijkl") == [[list("gh")]]
    assert suspects.rounds(batches, "abcdefghijkl") == []


def test_one_death_changes_no_batch(tmp_path: Path) -> None:
    suspects = Suspects(task(tmp_path, died_with(tmp_path, "one", "efgh")))
    assert suspects.rounds(["abcd", "efgh"], "abcd") == [[list("efgh")]]


def test_narrowing_counts_as_getting_further(tmp_path: Path) -> None:
    first, second = died_with(tmp_path, "one", "ab"), died_with(tmp_path, "two", "ab")
    nothing = died_with(tmp_path, "three", "")
    for deaths, advanced in (((first,), False), ((first, second), True), ((first, second, nothing), False)):
        attempt = task(tmp_path / str(len(deaths)), *deaths)
        Suspects(attempt)
        assert (attempt.out / "advanced").exists() == advanced


def test_when_every_prompt_kills_its_worker_it_is_not_the_prompts(tmp_path: Path) -> None:
    deaths = [died_with(tmp_path, f"{each}{number}", each) for each in "abcde" for number in (1, 2)]
    with pytest.raises(DataError, match=r"5 prompts \(a, b, c, ...\) each killed their worker"):
        Suspects(task(tmp_path, *deaths))


POISON = """
import os, ctypes
import aipo_hpc.engines.transformers as engine, aipo_hpc.rankers.pairrm as ranker

def sample(self, batch, run=engine.TransformersEngine._run):
    if any(request.prompt_id == os.environ["POISON_GENERATE"] for request in batch):
        ctypes.string_at(0)
    return run(self, batch)

def rank(self, rows, rank=ranker.PairRM.rank):
    if any(row.prompt_id == os.environ["POISON_RANK"] for row in rows):
        os._exit(137)
    return rank(self, rows)

engine.TransformersEngine._run = sample
ranker.PairRM.rank = rank
"""
"""Loaded into every process of the run: one prompt segfaults the engine, another one ends the ranker's process."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_prompts_that_kill_their_worker_are_set_aside_and_the_run_finishes_without_them(
    tmp_path: Path, small_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(
        small_recipe,
        iterations=1,
        cluster="local",
        data=replace(small_recipe.data, limit=12, num_held_out=2),
        generate=replace(small_recipe.generate, num_shards=1, batch_size=4),
    )
    prepared = launch(replace(recipe, drive="prepare"))
    (sentinel,) = prepared.job("iter-00/prompts").done(read_graph(prepared).fingerprints["iter-00/prompts"]).values()
    (train,) = [path for path in prepared.job("iter-00/prompts").files(sentinel) if path.name == "train.parquet"]
    from aipo_hpc.rows import Prompt

    prompts = list(read_rows([train], Prompt))
    bad, worse = prompts[5], prompts[8]
    site = tmp_path / "site"
    site.mkdir()
    (site / "poison.py").write_text(POISON)
    (site / "sitecustomize.py").write_text(
        "import sys\nif any('submitit' in argument for argument in sys.orig_argv): import poison\n"
    )
    code = "import sys, pickle; from aipo_hpc.launch import launch; launch(pickle.load(open(sys.argv[1], 'rb')))"
    import pickle

    (tmp_path / "recipe.pickle").write_bytes(pickle.dumps(recipe))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(Path(__file__).parents[1])]),
        "POISON_GENERATE": bad.prompt_id,
        "POISON_RANK": worse.prompt_id,
    }
    argv = [sys.executable, "-c", code, str(tmp_path / "recipe.pickle")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr

    run = Run(prepared.path)
    graph = read_graph(run)
    told = {}
    for name, kind in (("iter-00/generate", Responses), ("iter-00/rank", Ranked)):
        (sentinel,) = run.job(name).done(graph.fingerprints[name]).values()
        rows = list(read_rows([path for path in run.job(name).files(sentinel) if path.name == "rows.parquet"], kind))
        told[name] = [(row.prompt_id, row.error) for row in rows if row.error is not None]
        assert [row.prompt_id for row in rows] == [prompt.prompt_id for prompt in prompts]
        assert sentinel.counts["set_aside"] == 1
    killed = "it killed its worker 2 times while nothing else was in flight"
    assert told["iter-00/generate"] == [(bad.prompt_id, killed)]
    assert sorted(told["iter-00/rank"]) == sorted([(bad.prompt_id, killed), (worse.prompt_id, killed)])
    deaths = {name: len(run.job(name).failures()) for name in told}
    print(f"deaths until they were found among 10 prompts: {deaths}")
    assert max(deaths.values()) <= 8
    print_report(run, graph)
    assert "iter-00/rank: 1 prompts set aside because they killed their workers" in capsys.readouterr().out
