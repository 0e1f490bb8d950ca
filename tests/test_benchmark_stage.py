"""The stage benchmark and the files made of it, with a small real model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from aipo_hpc import leaving
from aipo_hpc.benchmarks import FAILED, BenchmarkConfig
from aipo_hpc.errors import DataError
from aipo_hpc.graph import Edge, build_graph
from aipo_hpc.launch import launch
from aipo_hpc.outside import Outside
from aipo_hpc.preflight import resolve
from aipo_hpc.progress import PROGRESS, ROWS, Progress
from aipo_hpc.recipe import Recipe, load_recipe
from aipo_hpc.rows import Responses, read_rows
from aipo_hpc.stages import answer_files, benchmark
from aipo_hpc.stages.answer_files import AnswerFilesConfig
from aipo_hpc.stages.benchmark import AnswersConfig, answering
from aipo_hpc.task import Input, Task

QUESTIONS = [
    {"question_id": 80 + number, "category": category, "turns": [f"why is {thing} red", f"write {number} words"]}
    for number, (category, thing) in enumerate(
        [("writing", "fire"), ("math", "one"), ("stem", "rain"), ("coding", "a dog"), ("roleplay", "the moon")]
    )
]
CONFIG = AnswersConfig(
    engine="transformers", name="mt_bench", temperature=0.7, top_k=50, max_tokens=8, max_prompt_tokens=120,
    dtype="float32", batch_size=2,
)  # fmt: skip


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def task(folder: Path, questions: Path, model: Path, shard: int = 0, num_shards: int = 1, **others: object) -> Task:
    out = folder / f"{shard}-of-{num_shards}"
    out.mkdir(parents=True, exist_ok=True)
    inputs = {"questions": Input(value=str(questions)), "policy": Input(value=str(model))}
    return Task("iter-00/answers-mt_bench", 0, shard, num_shards, 7, inputs, out, **others)  # type: ignore[arg-type]


def rows(job: Task) -> dict[str, Responses]:
    return {row.prompt_id: row for row in read_rows([job.out / ROWS], Responses)}


def test_the_second_turn_is_asked_after_the_models_own_first_answer(questions, tiny_model, tmp_path):
    job = task(tmp_path, questions, tiny_model)
    outcome = benchmark.run(CONFIG, job)
    found = rows(job)
    assert outcome.rows == 10 and outcome.counts["questions"] == 5 and outcome.counts["errors"] == 0
    for row in QUESTIONS:
        first, second = (found[f"{row['question_id']}/{turn}"] for turn in (0, 1))
        assert [(said.role, said.content) for said in first.messages] == [("user", row["turns"][0])]
        assert [(said.role, said.content) for said in second.messages] == [
            ("user", row["turns"][0]),
            ("assistant", first.candidates[0].response),
            ("user", row["turns"][1]),
        ]
    print(found["80/1"].messages, found["80/1"].candidates[0])


def test_each_question_is_sampled_at_its_own_temperature(questions, tiny_model, tmp_path):
    cold = [{**row, "category": "math"} for row in QUESTIONS]
    (tmp_path / "cold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cold))
    one, other = task(tmp_path / "a", questions, tiny_model), task(tmp_path / "b", tmp_path / "cold.jsonl", tiny_model)
    benchmark.run(CONFIG, one)
    benchmark.run(CONFIG, other)
    mixed, greedy = rows(one), rows(other)
    same = {name for name in mixed if mixed[name].candidates == greedy[name].candidates}
    assert {"81/0", "81/1", "83/0", "83/1"} <= same  # math and coding are greedy in both
    assert not {"80/0", "84/0"} <= same  # writing and roleplay are drawn


def test_answers_depend_neither_on_sharding_nor_on_a_kill(questions, tiny_model, tmp_path):
    alone = replace(CONFIG, batch_size=1)
    whole = task(tmp_path / "whole", questions, tiny_model)
    benchmark.run(alone, whole)
    parts = [task(tmp_path / "parts", questions, tiny_model, shard, 2) for shard in (0, 1)]
    for part in parts:
        benchmark.run(alone, part)
    assert {**rows(parts[0]), **rows(parts[1])} == rows(whole)

    torn = tmp_path / "torn"
    torn.mkdir()
    lines = (whole.out / PROGRESS).read_text().splitlines(keepends=True)
    (torn / PROGRESS).write_text("".join(lines[:6]) + lines[6][:20])
    resumed = task(tmp_path / "resumed", questions, tiny_model, earlier=(torn,))
    outcome = benchmark.run(alone, resumed)
    assert outcome.counts["taken_over"] == 6
    assert (resumed.out / ROWS).read_bytes() == (whole.out / ROWS).read_bytes()


def test_asked_to_leave_it_stops_between_batches_and_another_attempt_goes_on(
    questions, tiny_model, tmp_path, monkeypatch
):
    append = Progress.append

    def append_and_be_asked(self, row):
        append(self, row)
        leaving.ask(leaving.STOP)

    with monkeypatch.context() as patched:
        patched.setattr(leaving, "_asked", leaving.NOT_ASKED)
        patched.setattr(Progress, "append", append_and_be_asked)
        first = task(tmp_path / "first", questions, tiny_model)
        with pytest.raises(leaving.Left, match="iter-00/answers-mt_bench shard 0"):
            benchmark.run(CONFIG, first)
    second = task(tmp_path / "second", questions, tiny_model, earlier=(first.out,))
    assert benchmark.run(CONFIG, second).counts["taken_over"] == 2
    whole = task(tmp_path / "whole", questions, tiny_model)
    benchmark.run(CONFIG, whole)
    assert (second.out / ROWS).read_bytes() == (whole.out / ROWS).read_bytes()


def test_a_turn_that_cannot_be_answered_says_why_and_so_does_the_next(questions, tiny_model, tmp_path):
    long = [{**QUESTIONS[0], "turns": ["why " * 200, "and?"]}, QUESTIONS[1]]
    questions.write_text("".join(json.dumps(row) + "\n" for row in long))
    job = task(tmp_path, questions, tiny_model)
    outcome = benchmark.run(replace(CONFIG, system_message="be kind"), job)
    found = rows(job)
    assert outcome.counts["errors"] == 2
    assert "longer than max_prompt_tokens=120" in str(found["80/0"].error)
    assert str(found["80/1"].error).startswith("turn 1 has no answer: prompt too long")
    assert found["81/0"].messages[0].content == "be kind" and found["81/1"].candidates
    made = answer_files.run(
        AnswerFilesConfig(("mt_bench",), "mine"), files_task(tmp_path, questions, job.out / ROWS, job.out / ROWS)
    )
    first = json.loads((tmp_path / "files" / made.outputs[0]).read_text().splitlines()[0])
    assert first["choices"] == [{"index": 0, "turns": [FAILED, FAILED]}]
    assert made.counts["mt_bench_errors"] == 2


def files_task(folder: Path, questions: Path, answers: Path, initial: Path | None = None) -> Task:
    (folder / "files").mkdir()
    inputs = {"mt_bench": Input(shards={0: (answers,)}), "mt_bench.questions": Input(value=str(questions))}
    if initial is not None:
        inputs["mt_bench.initial"] = Input(shards={0: (initial,)})
    return Task("iter-00/answer_files", 0, 0, 1, 7, inputs, folder / "files")


def test_files_name_the_model_and_hold_every_question(questions, tiny_model, tmp_path):
    job = task(tmp_path, questions, tiny_model)
    benchmark.run(CONFIG, job)
    made = answer_files.run(
        AnswerFilesConfig(("mt_bench",), "mine"), files_task(tmp_path, questions, job.out / ROWS, job.out / ROWS)
    )
    assert made.outputs == ("mt_bench/model_answer/mine-iter-00.jsonl", "mt_bench/model_answer/mine-initial.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "files" / made.outputs[0]).read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [80, 81, 82, 83, 84]
    found = rows(job)
    for line in lines:
        given = [found[f"{line['question_id']}/{turn}"].candidates[0].response for turn in (0, 1)]
        assert (line["model_id"], line["choices"][0]["turns"]) == ("mine-iter-00", given)
    assert made.counts["mt_bench_questions"] == made.counts["mt_bench_initial_questions"] == 5


# -- in a recipe -----------------------------------------------------------------------------------------------------


def with_benchmarks(recipe: Recipe, questions: Path, **settings: int) -> Recipe:
    asked = BenchmarkConfig("mt_bench", str(questions), **settings)
    return replace(recipe, evaluate=replace(recipe.evaluate, benchmarks=(asked,)))


def test_the_recipes_engine_answers_sampled_as_the_benchmark_does(questions):
    recipe = load_recipe("ultrafeedback")
    found = answering(BenchmarkConfig("mt_bench", str(questions)), recipe.generate)
    assert (found.engine, found.dtype, found.resources) == ("vllm", "bfloat16", recipe.generate.resources)
    assert (found.temperature, found.max_tokens, found.top_k) == (0.7, 1024, 50)
    limited = answering(BenchmarkConfig("arena_hard", "q", max_tokens=100, max_prompt_tokens=50), recipe.generate)
    assert (limited.temperature, limited.max_tokens, limited.max_prompt_tokens) == (0.0, 100, 50)


def test_every_policy_answers_and_the_initial_one_once(questions):
    graph = build_graph(with_benchmarks(load_recipe("demo"), questions, num_shards=3))
    assert graph.jobs["iter-00/baseline-mt_bench"].num_shards == graph.jobs["iter-01/answers-mt_bench"].num_shards == 3
    assert isinstance(graph.jobs["iter-00/baseline-mt_bench"].inputs["policy"], Outside)
    first, second = (graph.jobs[f"iter-0{number}/answer_files"].inputs for number in (0, 1))
    assert set(first) == {"mt_bench", "mt_bench.initial", "mt_bench.questions"}
    assert set(second) == {"mt_bench", "mt_bench.questions"}
    assert graph.jobs["iter-01/answers-mt_bench"].inputs["policy"] == Edge("iter-01/train", "model/")


def test_benchmarks_change_nothing_of_the_other_jobs_and_questions_are_known_by_content(questions, tmp_path):
    plain, asked = load_recipe("demo"), with_benchmarks(load_recipe("demo"), questions)
    before, after = build_graph(plain).fingerprints, build_graph(asked).fingerprints
    assert all(after[name] == before[name] for name in before)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(questions.read_bytes())
    assert build_graph(with_benchmarks(plain, moved)).fingerprints == after
    moved.write_text(moved.read_text().replace("fire", "ice"))
    assert (
        build_graph(with_benchmarks(plain, moved)).fingerprints["iter-00/answer_files"] != after["iter-00/answer_files"]
    )


def test_questions_are_checked_before_anything_is_submitted(questions):
    questions.write_text('{"instruction": "of another benchmark"}')
    with pytest.raises(DataError, match="not in the form that mt_bench publishes"):
        resolve(build_graph(with_benchmarks(load_recipe("demo"), questions)))


def test_a_run_leaves_files_for_the_benchmarks_own_tools(small_recipe, questions):
    small = replace(small_recipe, iterations=1, generate=replace(small_recipe.generate, n=2))
    run = launch(with_benchmarks(small, questions, num_shards=2, max_tokens=8, max_prompt_tokens=200))
    (folder,) = (run.path / "iter-00/answer_files/shards/00000").iterdir()
    names = sorted(path.name for path in (folder / "mt_bench/model_answer").iterdir())
    assert names == ["demo-initial.jsonl", "demo-iter-00.jsonl"]
    for name in names:
        assert len((folder / "mt_bench/model_answer" / name).read_text().splitlines()) == 5
