"""The vLLM engine for real, on a CPU: one engine in a process of its own for the whole module.

Run as a script it is that process: it works on the shards described by a folder, writes result.json, and then goes on
generating until it is killed.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pairrm_checkpoint import Checkpoint
from tiny_models import tiny_model_folder
from training_tasks import PLAIN, train_task

from aipo_hpc import engines
from aipo_hpc.chat import load_tokenizer, prompt_ids, response_ids
from aipo_hpc.engines import Request
from aipo_hpc.errors import RecipeError
from aipo_hpc.processes import descendants, start_time
from aipo_hpc.rankers import UNPARSABLE, from_texts, judge, replies
from aipo_hpc.rankers.config import JudgeConfig
from aipo_hpc.resources import Resources
from aipo_hpc.rows import Message, Pair, Prompt, Responses, read_rows, write_rows
from aipo_hpc.stages import generate, pairs, rank, reference, train
from aipo_hpc.stages.generate import GenerateConfig
from aipo_hpc.suspects import Suspects
from aipo_hpc.task import Input, Task

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

REPOSITORY = Path(__file__).parents[1]
CONFIG = GenerateConfig(
    engine="vllm",
    n=3,
    temperature=0.9,
    top_k=50,
    max_tokens=24,
    max_prompt_tokens=40,
    min_prompt_tokens=1,
    dtype="float32",
    enforce_eager=True,
    max_num_seqs=16,
)
SECOND_EOS = 300
LONG = "why " * 60


def prompts() -> list[Prompt]:
    texts = [f"{verb} {thing}" for verb in ("explain", "name", "list") for thing in ("the moon", "a river", "snow")]
    texts[4] = LONG
    return [Prompt(f"p{number}", text, [Message("user", text)]) for number, text in enumerate(texts)]


def shard_task(folder: Path, model: Path, attempt: str, earlier: tuple[Path, ...] = ()) -> Task:
    (folder / attempt).mkdir(exist_ok=True)
    inputs = {"prompts": Input(shards={0: (folder / "prompts.parquet",)}), "policy": Input(value=str(model))}
    return Task("iter-00/generate", 0, 0, 1, 5, inputs, folder / attempt, earlier)


def ask(number: int, length: int = 12, start: int = 40, seed: int = 7) -> Request:
    return Request(f"r{number}", 0, tuple(start + position for position in range(length)), seed)


def judged(engine: engines.Engine, model: Path) -> tuple[list[Any], list[list[list[str]]]]:
    """The engine's model as a judge: its rankings, and its replies to the same questions asked twice."""
    replies.load_engine = lambda config, model: engine
    judge.RUBRIC = "judge {request} {response}"
    asker = replies.Asker(JudgeConfig(num_samples=3, max_prompt_tokens=40), str(model), seed=5)
    rows = from_texts(["why", "name"], [["red", "blue", "red"], ["one " * 60, "two"]])
    rankings = judge.Judge(asker).rank(rows)
    questions = [asker.question("p", str(number), lambda texts: texts[0], ["story"]) for number in range(2)]
    return [asdict(each) for each in rankings], [asker.replies(questions) for _ in range(2)]


def process(folder: Path, model: Path) -> None:
    """What the process with the engine does."""
    result: dict[str, Any] = {}
    try:
        engines.load_engine(replace(CONFIG, max_tokens=4096), str(model))
    except RecipeError as error:
        result["too_long_for_the_model"] = str(error)
    engine = engines.load_engine(CONFIG, str(model))
    engines.load_engine = lambda config, model: engine  # the stage below uses the engine that is there
    result["descendants"] = [(pid, start_time(pid), os.getpgid(pid)) for pid in descendants(os.getpid())]
    result["group"] = os.getpgid(0)
    for attempt in ("first", "again"):
        result[attempt] = asdict(generate.run(CONFIG, shard_task(folder, model, attempt)))
    asked = [
        [ask(0)],
        [ask(1, length=200)],
        [ask(2, length=0)],
        [Request("r3", 0, (99999,), 1)],
        [ask(4)],
        [ask(5, seed=8)],
    ]
    result["direct"] = [asdict(done) for done in engine.generate(asked)]
    [whole] = engine.generate([[ask(6)]])
    stop = whole.text[len(whole.text) // 2 :][:3]
    result["stopped"] = [asdict(done) for done in (whole, *engine.generate([[replace(ask(6), stop=(stop,))]]))]
    result["judged"], result["replies"] = judged(engine, model)
    (folder / "result.json").write_text(json.dumps(result))
    for _ in engine.generate([[ask(number, seed=number)] for number in range(100_000)]):
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose generation config names a second end-of-sequence token, and settings of sampling."""
    folder = tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")
    path = folder / "generation_config.json"
    settings = {"eos_token_id": [2, SECOND_EOS], "do_sample": True, "temperature": 0.01, "repetition_penalty": 5.0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


class Running:
    """The process with the engine, and what it found."""

    def __init__(self, folder: Path, model: Path) -> None:
        write_rows(folder / "prompts.parquet", prompts(), Prompt)
        self.folder = folder
        self.log = folder / "log.txt"
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "VLLM_CPU_KVCACHE_SPACE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(folder), str(model)],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 240
        while not (folder / "result.json").exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)
        time.sleep(0.2)
        self.result: dict[str, Any] = json.loads((folder / "result.json").read_text())

    def rows(self, attempt: str) -> list[Responses]:
        return list(read_rows([self.folder / attempt / "rows.parquet"], Responses))

    def living(self) -> list[int]:
        return [pid for pid, started, _ in self.result["descendants"] if start_time(pid) == started]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Running]:
    run = Running(tmp_path_factory.mktemp("vllm"), model)
    yield run
    if run.process.poll() is None:
        os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()


@pytest.mark.timeout(300)
def test_a_shard_gives_every_prompt_a_row_in_order_with_all_candidates(running: Running) -> None:
    rows = running.rows("first")
    assert [row.prompt_id for row in rows] == [prompt.prompt_id for prompt in prompts()]
    assert [len(row.candidates) for row in rows] == [3, 3, 3, 3, 0, 3, 3, 3, 3]
    outcome = running.result["first"]
    candidates = [candidate for row in rows for candidate in row.candidates]
    assert outcome["rows"] == 9
    assert outcome["counts"] == {
        "candidates": 24,
        "errors": 1,
        "tokens": sum(candidate.num_tokens for candidate in candidates),
        "characters": sum(len(candidate.response) for candidate in candidates),
        "truncated": sum(candidate.finish_reason == "length" for candidate in candidates),
        "taken_over": 0,
    }


def test_a_prompt_that_is_too_long_is_recorded_and_the_others_are_served(running: Running) -> None:
    bad = running.rows("first")[4]
    assert bad.candidates == []
    assert bad.error is not None and bad.error.endswith("tokens is longer than generate.max_prompt_tokens=40")


def test_candidates_end_by_a_token_or_at_the_limit_and_their_tokens_are_counted(running: Running, model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    reasons = set()
    for row in running.rows("first"):
        for candidate in row.candidates:
            reasons.add(candidate.finish_reason)
            assert candidate.num_tokens == 24 if candidate.finish_reason == "length" else candidate.num_tokens <= 24
            assert "</s>" not in candidate.response
            assert tokenizer.convert_ids_to_tokens(SECOND_EOS) not in candidate.response[-1:]
    assert reasons == {"stop", "length"}


def test_candidates_of_a_prompt_differ_because_settings_are_the_recipes_not_the_models(running: Running) -> None:
    # At the temperature of the model's generation config, 0.01, all candidates would be the same.
    for row in running.rows("first"):
        assert len({candidate.response for candidate in row.candidates}) == len(row.candidates)


def test_the_same_seeds_give_the_same_candidates_again(running: Running) -> None:
    first, again = (running.folder / attempt / "rows.parquet" for attempt in ("first", "again"))
    assert first.read_bytes() == again.read_bytes()
    direct = {done["request"]["prompt_id"]: done for done in running.result["direct"]}
    assert direct["r0"]["text"] == direct["r4"]["text"]
    assert direct["r0"]["text"] != direct["r5"]["text"]


def test_refused_requests_are_reported_and_hurt_no_other(running: Running) -> None:
    direct = {done["request"]["prompt_id"]: done for done in running.result["direct"]}
    assert set(direct) == {"r0", "r1", "r2", "r3", "r4", "r5"}
    for name, words in (("r1", "maximum context length is 64"), ("r2", "empty"), ("r3", "out of vocabulary")):
        assert direct[name]["error"].startswith("vllm refused it: ")
        assert words in direct[name]["error"]
        assert (direct[name]["text"], direct[name]["num_tokens"]) == ("", 0)
    assert all(direct[name]["error"] is None and direct[name]["num_tokens"] > 0 for name in ("r0", "r4", "r5"))


def test_sampling_ends_where_a_stop_text_comes_up(running: Running) -> None:
    whole, stopped = running.result["stopped"]
    [stop] = stopped["request"]["stop"]
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)] != whole["text"]
    assert stopped["finish_reason"] == "stop" and stopped["num_tokens"] < whole["num_tokens"]


def test_the_engines_model_can_judge_and_each_reply_is_drawn_by_its_own_seed(running: Running) -> None:
    for ranking, replies_asked_for in zip(running.result["judged"], (6, 6), strict=True):
        assert ranking["error"] == UNPARSABLE, "a random model says nothing that can be read"
        assert (ranking["replies"], ranking["unparsable"]) == (replies_asked_for, replies_asked_for)
    first, again = running.result["replies"]
    assert first == again
    assert len({reply for each in first for reply in each}) == 6 and all(reply for each in first for reply in each)


def test_more_tokens_than_the_model_can_hold_are_the_recipes_error(running: Running) -> None:
    message = running.result["too_long_for_the_model"]
    assert message.startswith("vllm does not take these settings for ")
    assert message.endswith("(max_model_len is max_prompt_tokens=40 + max_tokens=4096).")


def test_its_rows_feed_ranking_pairs_reference_and_training(
    running: Running, model: Path, ranker_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def task(name: str, inputs: dict[str, Input]) -> Task:
        (tmp_path / name).mkdir()
        return Task(f"iter-00/{name}", 0, 0, 1, 5, inputs, tmp_path / name)

    policy = Input(value=str(model))
    responses = Input(shards={0: (running.folder / "first" / "rows.parquet",)})
    ranking = task("rank", {"responses": responses, "ranker": Input(value=str(ranker_checkpoint.pairrm))})
    rank.run(rank.RankConfig(), ranking)
    ranked = Input(shards={0: (ranking.out / "rows.parquet",)})
    paired = task("pairs", {"ranked": ranked, "policy": policy})
    made = pairs.run(pairs.PairsConfig(), paired)
    assert made.counts["dropped_prompt_too_long"] == 1
    assert made.rows + sum(value for key, value in made.counts.items() if key.startswith("dropped_")) == 9
    found = list(read_rows([paired.out / pairs.PAIRS], Pair))
    tokenizer = load_tokenizer(str(model))
    for pair in found:
        assert pair.chosen.response != pair.rejected.response
        assert prompt_ids(tokenizer, pair.messages)[0] == tokenizer.bos_token_id
        ended = response_ids(tokenizer, pair.chosen.response, pair.chosen.finish_reason)[-1] == tokenizer.eos_token_id
        assert ended == (pair.chosen.finish_reason == "stop")
    scored = task(
        "reference", {"pairs": Input(shards={0: (paired.out / pairs.PAIRS,)}), "reference": policy, "policy": policy}
    )
    assert reference.run(reference.ReferenceConfig(dtype="float32"), scored).rows == made.rows
    config = train.TrainConfig(**{**PLAIN, "global_batch_size": 2, "resources": Resources()})
    trained = train.run(config, train_task(tmp_path / "train", scored.out / "rows.parquet", model))
    assert trained.counts["loss_first"] > 0


@pytest.mark.timeout(60)
def test_its_processes_end_when_the_main_process_is_killed_without_warning(running: Running) -> None:
    engine_and_workers = [group for _, _, group in running.result["descendants"] if group == running.result["group"]]
    assert len(engine_and_workers) >= 2, "killing the process group ends them too"
    assert len(running.living()) >= 3
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    deadline = time.monotonic() + 20
    while running.living():
        assert time.monotonic() < deadline, running.living()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_fails_with_its_engine_loaded_ends(model: Path, tmp_path: Path) -> None:
    """Even where a finalizer was made before multiprocessing was imported, so that vLLM's would run too late."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import tempfile\n"
        "scratch = tempfile.TemporaryDirectory()\n"
        "from test_engine_vllm import CONFIG\n"
        "from aipo_hpc import engines\n"
        f"if __name__ == '__main__':\n    engine = engines.load_engine(CONFIG, {str(model)!r})\n    raise ValueError('no')\n"
    )
    paths = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": paths, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 1 and "ValueError: no" in done.stderr, done.stderr[-3000:]


POISONED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from test_engine_vllm import CONFIG, shard_task
from aipo_hpc import engines
from aipo_hpc.engines.vllm import VllmEngine
from aipo_hpc.failures import classify
from aipo_hpc.processes import descendants
from aipo_hpc.stages import generate

def add(self, name, request, add=VllmEngine._add):
    error = add(self, name, request)
    if request.prompt_id == sys.argv[4]:
        for pid in descendants(os.getpid()):
            os.kill(pid, signal.SIGKILL)
    return error

if __name__ == "__main__":
    VllmEngine._add = add
    dead = tuple(map(Path, sys.argv[5:]))
    task = shard_task(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], dead)
    try:
        print("told:", dict(generate.run(CONFIG, replace(task, deaths=dead)).counts))
    except Exception as error:
        print(f"told: {type(error).__name__} is classed as {classify(error)}")
        sys.exit(7)
"""
"""One attempt at a shard: the engine's process is killed as soon as it has been given a prompt."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_prompt_that_kills_the_engines_process_is_found_among_those_in_flight_and_set_aside(
    model: Path, tmp_path: Path
) -> None:
    asked = prompts()[:2]
    write_rows(tmp_path / "prompts.parquet", asked, Prompt)
    (tmp_path / "attempt.py").write_text(POISONED)
    paths = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": paths, "VLLM_CPU_KVCACHE_SPACE": "1"}
    dead: list[Path] = []
    while True:
        argv = [sys.executable, tmp_path / "attempt.py", tmp_path, model, str(len(dead)), asked[1].prompt_id, *dead]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=240)
        said = "".join(line for line in done.stdout.splitlines() if line.startswith("told: "))
        print(f"attempt {len(dead)}: {said}")
        if done.returncode == 0:
            break
        assert "is classed as killed" in said, done.stderr[-3000:]
        dead.append(tmp_path / str(len(dead)))
        assert len(dead) <= 4, "the halves of two are one each, and one is blamed after two deaths alone"
    good, bad = read_rows([tmp_path / str(len(dead)) / "rows.parquet"], Responses)
    assert (good.error, len(good.candidates)) == (None, 3)
    assert bad.error == Suspects.reason
    assert "'set_aside': 1" in said


if __name__ == "__main__":
    process(Path(sys.argv[1]), Path(sys.argv[2]))
