"""The generate stage: which prompts a shard has, what becomes of bad ones, and what an interrupted shard does again."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_model_folder

from aipo_hpc import engines
from aipo_hpc.chat import load_tokenizer
from aipo_hpc.engines import Completion, Request
from aipo_hpc.rows import PROMPT_TOO_LONG, PROMPT_TOO_SHORT, Message, Prompt, Responses, read_rows, write_rows
from aipo_hpc.stages.generate import (
    GenerateConfig,
    num_candidates,
    put,
    run,
    sampled_only,
    sampling_seed,
    select,
    shard_of,
)
from aipo_hpc.task import Input, Task

CONFIG = GenerateConfig(
    engine="transformers", n=2, max_tokens=8, max_prompt_tokens=40, dtype="float32", batch_size=2, temperature=0.9
)


def prompts(number: int) -> list[Prompt]:
    texts = [f"tell {index} " + "why " * (index % 4) for index in range(number)]
    return [Prompt(f"p{index}", text, [Message("user", text)]) for index, text in enumerate(texts)]


def task(
    folder: Path,
    source: Sequence[Prompt],
    model: Path,
    attempt: str = "a",
    earlier: tuple[Path, ...] = (),
    **changes: int,
) -> Task:
    out = folder / attempt
    out.mkdir(parents=True)
    write_rows(folder / "train.parquet", source, Prompt)
    inputs = {"prompts": Input(shards={0: (folder / "train.parquet",)}), "policy": Input(value=str(model))}
    made = Task("iter-00/generate", 0, 0, 1, 5, inputs, out, earlier)
    return replace(made, **changes)  # type: ignore[arg-type]


def rows(made: Task) -> list[Responses]:
    return list(read_rows([made.out / "rows.parquet"], Responses))


def composition(engine: "FakeEngine") -> list[list[str]]:
    """The prompts that were asked for together."""
    return [[prompt[0].prompt_id for prompt in batch] for batch in engine.batches]


class FakeEngine:
    """Answers in reverse order of what it is asked at once, each answer telling the seed; counts and may die."""

    def __init__(self, die_after: int | None = None, refuse: str | None = None) -> None:
        self.asked: list[Request] = []
        self.batches: list[Sequence[Sequence[Request]]] = []
        self._die_after = die_after
        self._refuse = refuse

    def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        self.batches.append(list(requests))
        for request in reversed(list(itertools.chain.from_iterable(self.batches[-1]))):
            if len(self.asked) == self._die_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            if request.prompt_id == self._refuse and request.candidate == 1:
                yield Completion(request, "", "error", 0, "no room")
            else:
                reason = "stop" if request.seed % 2 else "length"
                yield Completion(request, f"seed {request.seed}", reason, request.seed % 9)


def use(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> FakeEngine:
    monkeypatch.setattr(engines, "load_engine", lambda config, model: engine)
    return engine


def test_shards_hold_every_prompt_once_whatever_the_numbers(tmp_path: Path, tiny_model: Path) -> None:
    made = task(tmp_path, [], tiny_model)
    for number, shards in itertools.product(range(0, 30), range(1, 12)):
        source = prompts(number)
        parts = [shard_of(source, replace(made, shard=shard, num_shards=shards)) for shard in range(shards)]
        assert [prompt for part in parts for prompt in part] == source
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_each_iteration_takes_the_next_prompts_and_starts_over_at_the_end(tmp_path: Path, tiny_model: Path) -> None:
    made = task(tmp_path, [], tiny_model)
    config, source = replace(CONFIG, num_prompts=4), prompts(10)
    taken = [select(source, config, replace(made, iteration=iteration)) for iteration in range(5)]
    assert [prompt.prompt_id for part in taken for prompt in part] == [f"p{index % 10}" for index in range(20)]
    assert select(source, replace(CONFIG, num_prompts=99), replace(made, iteration=1)) == source
    assert select(source, CONFIG, replace(made, iteration=3)) == source


def test_seeds_differ_by_run_iteration_prompt_and_candidate() -> None:
    places = list(itertools.product(range(3), range(4), ("a", "b", "a\0"), range(5)))
    seeds = {sampling_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seed(42, 1, "p", 2) == sampling_seed(42, 1, "p", 2) == 1711110439


def test_rows_come_in_the_prompts_order_with_candidates_in_theirs(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = use(monkeypatch, FakeEngine())
    made = task(tmp_path, prompts(5), tiny_model, iteration=2)
    outcome = run(CONFIG, made)
    found = rows(made)
    assert [row.prompt_id for row in found] == ["p0", "p1", "p2", "p3", "p4"]
    for row in found:
        seeds = [sampling_seed(5, 2, row.prompt_id, candidate) for candidate in range(2)]
        assert [candidate.response for candidate in row.candidates] == [f"seed {seed}" for seed in seeds]
        assert [candidate.num_tokens for candidate in row.candidates] == [seed % 9 for seed in seeds]
        reasons = ["stop" if seed % 2 else "length" for seed in seeds]
        assert [candidate.finish_reason for candidate in row.candidates] == reasons
    assert len(engine.asked) == 10
    candidates = [candidate for row in found for candidate in row.candidates]
    assert outcome.rows == 5
    assert outcome.outputs == ("rows.parquet",)
    assert outcome.counts == {
        "candidates": 10,
        "errors": 0,
        "tokens": sum(candidate.num_tokens for candidate in candidates),
        "characters": sum(len(candidate.response) for candidate in candidates),
        "truncated": sum(candidate.finish_reason == "length" for candidate in candidates),
        "taken_over": 0,
    }


def test_bad_prompts_are_recorded_and_the_others_are_served(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model_folder(tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    complaint = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    (model / "chat_template.jinja").write_text(complaint + template)
    source = prompts(6)
    source[1] = Prompt("long", "why " * 100, [Message("user", "why " * 100)])
    source[2] = Prompt("bad", "bad", [Message("user", "bad")])
    engine = use(monkeypatch, FakeEngine(refuse="p4"))
    made = task(tmp_path, source, model)
    outcome = run(CONFIG, made)
    found = {row.prompt_id: row for row in rows(made)}
    assert list(found) == ["p0", "long", "bad", "p3", "p4", "p5"]
    assert found["long"].error is not None
    assert found["long"].error.startswith(PROMPT_TOO_LONG)
    assert found["long"].error.endswith(" tokens is longer than generate.max_prompt_tokens=40")
    assert found["bad"].error == "chat template: roles must alternate"
    assert found["p4"].error == "no room"
    assert all(not found[name].candidates for name in ("long", "bad", "p4"))
    assert all(found[name].error is None and len(found[name].candidates) == 2 for name in ("p0", "p3", "p5"))
    assert {request.prompt_id for request in engine.asked} == {"p0", "p3", "p4", "p5"}
    assert (outcome.rows, outcome.counts["errors"], outcome.counts["candidates"]) == (6, 3, 6)


def test_a_second_attempt_asks_only_for_what_is_missing_and_gives_the_same_bytes(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, batch_size=1)
    whole = task(tmp_path / "whole", prompts(9), tiny_model)
    use(monkeypatch, FakeEngine())
    run(config, whole)
    killed = task(tmp_path / "killed", prompts(9), tiny_model)
    use(monkeypatch, FakeEngine(die_after=7))
    with pytest.raises(KeyboardInterrupt):
        run(config, killed)
    again = task(tmp_path / "killed", prompts(9), tiny_model, attempt="b", earlier=(killed.out,))
    engine = use(monkeypatch, FakeEngine())
    outcome = run(config, again)
    # Of 9 prompts x 2 candidates, 3 prompts were whole when it died.
    assert outcome.counts["taken_over"] == 3
    assert sorted({request.prompt_id for request in engine.asked}) == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert (again.out / "rows.parquet").read_bytes() == (whole.out / "rows.parquet").read_bytes()
    third = task(tmp_path / "killed", prompts(9), tiny_model, attempt="c", earlier=(killed.out, again.out))
    idle = use(monkeypatch, FakeEngine())
    assert run(config, third).counts["taken_over"] == 9
    assert idle.asked == []
    assert (third.out / "rows.parquet").read_bytes() == (whole.out / "rows.parquet").read_bytes()


def test_a_second_attempt_asks_for_whole_batches_where_results_depend_on_them(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prompts(8)
    source[1] = Prompt("long", "why " * 100, [Message("user", "why " * 100)])
    first = task(tmp_path, source, tiny_model)
    engine = use(monkeypatch, FakeEngine(die_after=6))  # after p0, p2 and p4, of which p4 shares its batch with p3
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, first)
    assert composition(engine) == [["p0", "p2"], ["p3", "p4"]]
    engine = use(monkeypatch, FakeEngine())
    run(CONFIG, task(tmp_path, source, tiny_model, attempt="b", earlier=(first.out,)))
    assert composition(engine) == [["p3", "p4"], ["p5", "p6"], ["p7"]]
    engine = use(monkeypatch, FakeEngine())
    vllm = replace(CONFIG, engine="vllm")  # which batches requests as they come
    run(vllm, task(tmp_path, source, tiny_model, attempt="c", earlier=(first.out,)))
    assert composition(engine) == [["p3", "p5", "p6", "p7"]]


def test_the_same_shard_gives_the_same_bytes_with_a_real_engine_even_when_resumed(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prompts(7)
    source[1] = Prompt("long", "why " * 100, [Message("user", "why " * 100)])
    one, two = (task(tmp_path / name, source, tiny_model) for name in ("one", "two"))
    for made in (one, two):
        run(CONFIG, made)
    expected = (one.out / "rows.parquet").read_bytes()
    assert (two.out / "rows.parquet").read_bytes() == expected
    found = rows(one)
    assert {candidate.finish_reason for row in found for candidate in row.candidates} <= {"stop", "length"}
    assert all(1 <= candidate.num_tokens <= 8 for row in found for candidate in row.candidates)
    lines = (one.out / "progress.jsonl").read_text().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "progress.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    resumed = task(tmp_path / "three", source, tiny_model, earlier=(cut,))
    assert run(CONFIG, resumed).counts["taken_over"] == 3
    assert (resumed.out / "rows.parquet").read_bytes() == expected


def test_a_shard_without_prompts_writes_an_empty_file_and_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "load_engine", None)
    made = task(tmp_path, prompts(2), tmp_path / "no model", shard=0, num_shards=5)
    outcome = run(CONFIG, made)
    assert rows(made) == []
    assert outcome.rows == 0
    assert outcome.counts["candidates"] == 0


def test_the_recipes_system_message_goes_before_conversations_that_have_none(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, own = prompts(2)
    own = replace(own, messages=[Message("system", "Be odd."), *own.messages])
    use(monkeypatch, FakeEngine())
    made = task(tmp_path, [plain, own], tiny_model)
    run(replace(CONFIG, system_message="Be brief."), made)
    found = rows(made)
    assert found[0].messages == [Message("system", "Be brief."), Message("user", plain.prompt)]
    assert found[1].messages == own.messages
    assert found[0].prompt == plain.prompt
    assert put(plain, "").messages[0] == Message("system", "")


def test_candidates_of_every_kind_come_in_their_order_and_say_where_they_are_from(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prompts(2)
    source[0] = replace(source[0], answer="red fish")
    config = replace(CONFIG, greedy=True, second_temperature=1.3, dataset_answer=True)
    engine = use(monkeypatch, FakeEngine())
    made = task(tmp_path, source, tiny_model)
    outcome = run(config, made)
    asked = sorted((request.candidate, request.temperature) for request in engine.asked if request.prompt_id == "p0")
    assert asked == [(0, 0.9), (1, 0.9), (2, 0.0), (3, 1.3), (4, 1.3)]
    with_answer, without = rows(made)
    kinds = ["sampled", "sampled", "greedy", "second_temperature", "second_temperature"]
    assert [candidate.source for candidate in with_answer.candidates] == [*kinds, "dataset"]
    assert [candidate.source for candidate in without.candidates] == kinds
    answer = with_answer.candidates[-1]
    assert (answer.response, answer.finish_reason) == ("red fish", "stop")
    assert answer.num_tokens == len(load_tokenizer(str(tiny_model))("red fish")["input_ids"]) + 1
    assert num_candidates(config) == 6
    assert num_candidates(sampled_only(config)) == 2
    extra = {name: count for name, count in outcome.counts.items() if name.startswith("candidates_")}
    assert extra == {"candidates_dataset": 1, "candidates_greedy": 2, "candidates_second_temperature": 4}


def test_what_is_sampled_does_not_depend_on_extra_candidates(tmp_path: Path, tiny_model: Path) -> None:
    plain, more = (task(tmp_path / name, prompts(3), tiny_model) for name in ("plain", "more"))
    run(CONFIG, plain)
    run(replace(CONFIG, greedy=True, second_temperature=1.3), more)
    for few, many in zip(rows(plain), rows(more), strict=True):
        assert many.candidates[:2] == few.candidates
        assert many.candidates[2].source == "greedy"
    greedy = task(tmp_path / "greedy", prompts(3), tiny_model)
    run(replace(CONFIG, temperature=0.0, n=1), greedy)
    alone = [row.candidates[0].response for row in rows(greedy)]
    assert [row.candidates[2].response for row in rows(more)] == alone


def test_prompts_of_too_few_tokens_are_recorded_and_skipped(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prompts(2)
    source[1] = Prompt("short", "why", [Message("system", "Be brief, be very brief."), Message("user", "why")])
    use(monkeypatch, FakeEngine())
    made = task(tmp_path, source, tiny_model)
    run(replace(CONFIG, max_prompt_tokens=60), made)
    length = len(load_tokenizer(str(tiny_model))("why")["input_ids"])
    assert length < 3
    served, short = rows(made)
    assert served.error is None
    assert short.error == f"{PROMPT_TOO_SHORT}: {length} tokens is shorter than generate.min_prompt_tokens=3"


@pytest.mark.parametrize(
    ("recipes_own", "keep", "expected"),
    [
        (None, True, ["Be odd."]),
        (None, False, []),
        ("", True, ["Be odd."]),
        ("", False, [""]),
        ("Be brief.", True, ["Be odd."]),
        ("Be brief.", False, ["Be brief."]),
    ],
)
def test_the_system_messages_of_the_source_are_kept_or_dropped(
    recipes_own: str | None, keep: bool, expected: list[str]
) -> None:
    (plain,) = prompts(1)
    own = replace(plain, messages=[Message("system", "Be odd."), *plain.messages])
    assert put(own, recipes_own, keep).messages == [*[Message("system", text) for text in expected], *plain.messages]
    added = [] if recipes_own is None else [Message("system", recipes_own)]
    assert put(plain, recipes_own, keep).messages == [*added, *plain.messages]
