"""The instruct stage: what a shard makes of its calls, that kills do not change it, and what the shards make together."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from aipo_hpc import leaving
from aipo_hpc.chat import load_tokenizer
from aipo_hpc.engines import Completion, Request
from aipo_hpc.errors import DataError
from aipo_hpc.harvest import DROPPED, DroppedTask, Harvest, Rules
from aipo_hpc.rows import Call, Clustered, Message, NewPrompt, Prompt, read_rows, write_rows
from aipo_hpc.stages import collect, instruct
from aipo_hpc.stages.instruct import InstructConfig, run, share
from aipo_hpc.task import Input, Outcome, Task

CONFIG = InstructConfig(
    num_prompts=20,
    engine="transformers",
    dtype="float32",
    batch_size=3,
    max_tokens=24,
    surplus=0,
    max_prompt_tokens=400,
)
RULES = Rules(2, (), 1, 100, 0.7, None, 10)
WORDS = "red blue green small large old new dog cat bird fish tree river stone house city moon sun star rain".split()


def prompts(texts: Sequence[str]) -> list[Prompt]:
    return [Prompt(f"p{number}", text, [Message("user", text)]) for number, text in enumerate(texts)]


POOL = prompts([f"tell a story of the {one} {two}" for one, two in itertools.combinations(WORDS, 2)][:60])


def task(
    folder: Path,
    model: Path,
    attempt: str = "a",
    earlier: tuple[Path, ...] = (),
    pool: Sequence[Prompt] = POOL,
    held_out: Sequence[Prompt] = (),
    made: Sequence[Prompt] = (),
    clusters: Sequence[Clustered] = (),
    **changes: int,
) -> Task:
    out = folder / attempt
    out.mkdir(parents=True)
    inputs = {"policy": Input(value=str(model))}
    for name, rows, kind in (
        ("pool", pool, Prompt),
        ("held_out", held_out, Prompt),
        ("made.00", made, Prompt),
        ("clusters", clusters, Clustered),
    ):
        if rows or name in ("pool", "held_out"):
            write_rows(folder / f"{name}.parquet", rows, kind)
            inputs[name] = Input(shards={0: (folder / f"{name}.parquet",)})
    return replace(Task("iter-00/instruct", 0, 0, 1, 5, inputs, out, earlier), **changes)  # type: ignore[arg-type]


def tasks_by_seed(request: Request) -> str:
    """Two tasks that no other call has."""
    first, second = (WORDS[request.seed // 20**power % 20] for power in (0, 1))
    return f" Say {request.seed} {first}.\n10. Tell {request.seed * 7919 % 1000003} {second}."


class FakeEngine:
    """Continues by a function of the request, in reverse order; counts, and may die."""

    def __init__(self, say: Callable[[Request], str] = tasks_by_seed, die_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.batches: list[list[str]] = []
        self._say = say
        self._die_after = die_after

    def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        requests = list(requests)
        self.batches.append([each.prompt_id for [each] in requests])
        for [request] in reversed(requests):
            if self._die_after is not None and len(self.asked) >= self._die_after:
                raise KeyboardInterrupt
            self.asked.append(request.prompt_id)
            yield Completion(request, self._say(request), "stop", 9)


def use(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> FakeEngine:
    monkeypatch.setattr(instruct, "load_engine", lambda config, model: engine)
    return engine


def new(made: Task) -> list[NewPrompt]:
    return list(read_rows([made.out / instruct.PROMPTS], NewPrompt))


def reasons(made: Task) -> Counter[str]:
    return Counter(row.reason for row in read_rows([made.out / DROPPED], DroppedTask))


def files(made: Task, outcome: Outcome) -> dict[str, bytes]:
    return {name: (made.out / name).read_bytes() for name in outcome.outputs}


# -- one shard ----------------------------------------------------------------------------------------------------------


def test_a_shard_makes_exactly_its_share_and_tells_what_it_took(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = use(monkeypatch, FakeEngine())
    made = task(tmp_path, tiny_model)
    outcome = run(CONFIG, made)
    found = new(made)
    assert len(found) == outcome.rows == 20
    assert len({row.prompt_id for row in found}) == 20
    calls = list(read_rows([made.out / "rows.parquet"], Call))
    assert [row.call_id for row in calls] == [f"00-00000-{number:06d}" for number in range(10)]
    assert all(len(set(row.seed_ids)) == 8 for row in calls)
    assert dict(outcome.counts) == {
        "wanted": 20, "calls": 10, "errors": 0, "tokens": 90, "tasks": 20, "kept": 20, "taken_over": 0
    }  # fmt: skip
    assert len(engine.asked) == 12, "four batches of three"


def test_a_killed_shard_continues_and_gives_the_same_bytes(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeEngine())
    whole = task(tmp_path / "whole", tiny_model)
    expected = files(whole, run(CONFIG, whole))
    for kill in (1, 4, 11):
        folder = tmp_path / f"killed-{kill}"
        first = task(folder, tiny_model, "a")
        use(monkeypatch, FakeEngine(die_after=kill))
        with pytest.raises(KeyboardInterrupt):
            run(CONFIG, first)
        second = task(folder, tiny_model, "b", (first.out,))
        engine = use(monkeypatch, FakeEngine())
        outcome = run(CONFIG, second)
        assert files(second, outcome) == expected
        assert outcome.counts["taken_over"] == kill
        print(f"killed after {kill} of 12 calls: {len(engine.asked)} made by the second attempt")
        assert len(engine.asked) <= 12
        starts = {int(batch[0].rsplit("-", 1)[1]) % 3 for batch in engine.batches}
        assert starts <= {0} and all(len(batch) == 3 for batch in engine.batches), "batches keep their composition"


@pytest.mark.parametrize("engine_name", ["transformers", "vllm"])
def test_a_shard_that_is_asked_to_leave_does_so_between_calls_and_continues_to_the_same_bytes(
    engine_name: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, engine=engine_name)
    use(monkeypatch, FakeEngine())
    whole = task(tmp_path / "whole", tiny_model)
    expected = files(whole, run(config, whole))

    def say(request: Request) -> str:
        monkeypatch.setattr(leaving, "_asked", leaving.STOP)
        return tasks_by_seed(request)

    first = task(tmp_path / "left", tiny_model, "a")
    use(monkeypatch, FakeEngine(say))
    with pytest.raises(leaving.Left, match="iter-00/instruct shard 0: asked to leave"):
        run(config, first)
    monkeypatch.setattr(leaving, "_asked", leaving.NOT_ASKED)
    use(monkeypatch, FakeEngine())
    second = task(tmp_path / "left", tiny_model, "b", (first.out,))
    outcome = run(config, second)
    assert files(second, outcome) == expected and outcome.counts["taken_over"] >= 3


def test_a_refused_call_leaves_the_batches_of_the_others_as_they_are(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = itertools.cycle([5, 5, 400, 5, 5, 5, 5])
    monkeypatch.setattr(instruct, "request_text", lambda seeds: "why " * next(lengths))
    engine = use(monkeypatch, FakeEngine())
    run(replace(CONFIG, max_prompt_tokens=300), task(tmp_path, tiny_model))
    for batch in engine.batches:
        assert len({int(name.rsplit("-", 1)[1]) // 3 for name in batch}) == 1


def test_what_a_shard_makes_does_not_depend_on_how_many_calls_are_asked_for_at_once(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(request: Request) -> str:  # two thirds of the calls bring nothing
        return tasks_by_seed(request) if request.seed % 3 == 0 else " - nothing"

    results = []
    for number in (1, 7, 1000):
        monkeypatch.setattr(Harvest, "expected_calls", lambda self, number=number: number)
        use(monkeypatch, FakeEngine(say))
        made = task(tmp_path / str(number), tiny_model)
        results.append(files(made, run(CONFIG, made)))
    assert results[0] == results[1] == results[2]


def test_seeds_of_calls_differ_by_run_iteration_shard_and_call(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def say(request: Request) -> str:
        seeds.append(request.seed)
        return tasks_by_seed(request)

    for number, place in enumerate(({}, {"seed": 6}, {"iteration": 1}, {"shard": 1, "num_shards": 2})):
        use(monkeypatch, FakeEngine(say))
        run(CONFIG, task(tmp_path / str(number), tiny_model, **place))
    assert len(set(seeds)) == len(seeds) >= 40


def test_a_call_puts_plain_text_to_the_model_with_the_tokenizers_own_beginning(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Request] = []

    def say(request: Request) -> str:
        requests.append(request)
        return tasks_by_seed(request)

    use(monkeypatch, FakeEngine(say))
    run(replace(CONFIG, num_prompts=1), task(tmp_path, tiny_model))
    tokenizer = load_tokenizer(str(tiny_model))
    text = str(tokenizer.decode(requests[0].prompt_token_ids))
    assert text.startswith("Come up with a series of tasks:\n\n1. tell a story of the ")
    assert text.endswith("\n9.") and "\n8. " in text and "<|" not in text
    assert requests[0].stop == ("\n11.",)


def test_tasks_that_repeat_the_pool_held_out_prompts_earlier_iterations_or_this_shard_are_dropped(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "explain in some detail why the small bird likes the old house at the river more than the new one"
    pool = [*POOL, *prompts([long])]
    held_out, earlier = prompts(["What eats the fish in the rain?"]), prompts(["Name seven stars."])
    said = itertools.cycle(
        [
            " tell a STORY of the red blue",
            f" {long.replace('some', 'much')}",
            " What eats the fish in the rain",
            " name seven stars\n10. List one reason for snow.",
        ]
    )
    use(monkeypatch, FakeEngine(lambda request: next(said)))
    made = task(tmp_path, tiny_model, pool=pool, held_out=held_out, made=earlier)
    run(replace(CONFIG, num_prompts=2, max_calls_per_prompt=4, batch_size=1), made)
    assert [row.prompt for row in new(made)] == ["List one reason for snow."]
    assert reasons(made) == {
        "same_as_pool": 2, "nearly_same_as_pool": 2, "same_as_held_out": 2, "same_as_earlier": 2, "same_as_new": 1
    }  # fmt: skip


def test_a_shard_that_finds_too_little_ends_after_its_calls_and_says_why(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = use(monkeypatch, FakeEngine(lambda request: " Draw a cat.\n10. - no"))
    made = task(tmp_path, tiny_model)
    outcome = run(replace(CONFIG, max_calls_per_prompt=2.5), made)
    assert outcome.rows == 0 and new(made) == []
    assert len(engine.asked) == outcome.counts["calls"] == 50
    assert (outcome.counts["dropped_blocked_word"], outcome.counts["dropped_punctuation_first"]) == (50, 50)


def test_a_call_that_the_engine_or_the_limit_refuses_is_counted_and_hurts_no_other(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(FakeEngine):
        def generate(self, requests: Iterable[Sequence[Request]]) -> Iterator[Completion]:
            for done in super().generate(requests):
                refused = done.request.prompt_id.endswith("2")
                yield Completion(done.request, "", "error", 0, "no room") if refused else done

    use(monkeypatch, Refusing())
    made = task(tmp_path / "a", tiny_model)
    outcome = run(CONFIG, made)
    assert (outcome.rows, outcome.counts["errors"]) == (20, 1)

    use(monkeypatch, FakeEngine())
    tight = task(tmp_path / "b", tiny_model)
    outcome = run(replace(CONFIG, max_prompt_tokens=10, max_calls_per_prompt=1), tight)
    assert (outcome.rows, outcome.counts["errors"]) == (0, 20)
    [first, *_] = read_rows([tight.out / "rows.parquet"], Call)
    assert first.error is not None and first.error.endswith("longer than instruct.max_prompt_tokens=10")


def test_seeds_are_as_long_as_new_prompts_may_be(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeEngine())
    pool = [*prompts(["dog", "why " * 200]), *(replace(prompt, prompt_id=f"q{n}") for n, prompt in enumerate(POOL[:9]))]
    made = task(tmp_path, tiny_model, pool=pool)
    run(replace(CONFIG, max_task_tokens=60), made)
    shown = {name for row in read_rows([made.out / "rows.parquet"], Call) for name in row.seed_ids}
    assert shown == {f"q{number}" for number in range(9)}


def test_no_cluster_gives_more_than_its_number_and_calls_move_on_to_the_others(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeEngine())
    clusters = [Clustered(prompt.prompt_id, number % 4) for number, prompt in enumerate(POOL)]
    for batch in (1, 3):
        made = task(tmp_path / str(batch), tiny_model, clusters=clusters)
        outcome = run(replace(CONFIG, num_per_cluster=5, batch_size=batch), made)
        assert Counter(row.cluster for row in new(made)) == {0: 5, 1: 5, 2: 5, 3: 5}
        for row in read_rows([made.out / "rows.parquet"], Call):
            assert {int(name[1:]) % 4 for name in row.seed_ids} == {row.cluster}
        assert outcome.counts["calls"] == 12


def test_a_real_model_goes_through_the_engine_and_a_repetition_gives_the_same_bytes(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = replace(CONFIG, num_prompts=4, max_calls_per_prompt=1.5, near_duplicate=1, top_k=0, temperature=1.0)
    first, second = task(tmp_path / "a", tiny_model), task(tmp_path / "b", tiny_model)
    one, two = run(config, first), run(config, second)
    assert files(first, one) == files(second, two)
    print(dict(one.counts))
    assert one.counts["tokens"] > 0 and one.counts["errors"] == 0


# -- judging ------------------------------------------------------------------------------------------------------------


def harvested(*calls: tuple[str, str], rules: Rules = RULES, wanted: int = 9) -> Harvest:
    harvest = Harvest(rules, wanted, lambda text: len(text.split()), {})
    for number, (text, finish_reason) in enumerate(calls):
        harvest.take(Call(f"c{number}", -1, [], text, finish_reason, 1))
    return harvest


def test_a_task_that_was_cut_off_is_dropped_and_one_that_ended_is_kept() -> None:
    harvest = harvested((" Name a tree.\n10. Name a ri", "length"), (" Say a word.\n10. Count the stars.", "stop"))
    assert [row.prompt for row in harvest.kept] == ["Name a tree.", "Say a word.", "Count the stars."]
    assert [(drop.text, drop.reason) for drop in harvest.dropped] == [("Name a ri", "cut_off")]


def test_no_more_tasks_are_taken_from_a_call_than_are_wanted_of_one() -> None:
    harvest = harvested((" Name a tree.\n10. Say a word.\n11. Count the stars.\n12. Sing to the mo", "length"))
    assert [row.prompt for row in harvest.kept] == ["Name a tree.", "Say a word."]
    assert harvest.dropped == []
    assert len(harvested((" Name a tree.\n10. Say a word.", "stop"), wanted=1).kept) == 1


def test_a_task_is_measured_after_its_answer_was_cut_away() -> None:
    harvest = harvested(
        (" Add 2 and 3. Answer: 5 because of the rules of sums", "stop"), rules=replace(RULES, max_tokens=4)
    )
    assert [row.prompt for row in harvest.kept] == ["Add 2 and 3."]
    harvest = harvested((" A: yes", "stop"))
    assert [(drop.text, drop.reason) for drop in harvest.dropped] == [("A: yes", "empty")]


def test_more_calls_are_expected_the_less_they_bring() -> None:
    assert harvested().expected_calls() == 5
    assert harvested((" Name a tree.", "stop"), (" - ", "stop")).expected_calls() == 16
    assert harvested((" - ", "stop")).expected_calls() == 90, "as many as there may be"


# -- shards together ----------------------------------------------------------------------------------------------------


def collected(
    folder: Path, shards: Sequence[Sequence[str]], num_prompts: int, min_share: float = 0.9
) -> tuple[Task, Outcome]:
    folder.mkdir()
    inputs = {}
    for shard, texts in enumerate(shards):
        rows = [NewPrompt(f"{shard}.{number}", text, -1, f"c{shard}.{number}") for number, text in enumerate(texts)]
        write_rows(folder / f"{shard}.parquet", rows, NewPrompt)
        inputs[shard] = (folder / f"{shard}.parquet",)
    out = folder / "out"
    out.mkdir()
    made = Task("iter-00/collect", 0, 0, 1, 5, {"new": Input(shards=inputs)}, out)
    return made, collect.run(collect.CollectConfig(num_prompts, 0.7, min_share), made)


def test_shares_add_up_whatever_the_numbers(tmp_path: Path, tiny_model: Path) -> None:
    made = task(tmp_path, tiny_model)
    for number, shards, surplus in itertools.product((1, 7, 100), (1, 3, 8), (0, 0.1, 1)):
        parts = [
            share(replace(CONFIG, num_prompts=number, surplus=surplus), replace(made, shard=shard, num_shards=shards))
            for shard in range(shards)
        ]
        assert number * (1 + surplus) <= sum(parts) < number * (1 + surplus) + 1
        assert max(parts) - min(parts) <= 1


def test_exactly_as_many_prompts_are_collected_as_are_asked_for_from_all_shards_alike(tmp_path: Path) -> None:
    texts = [
        [f"Write {number} about the {word}." for number in ("one", "two", "three")] for word in ("sea", "moon", "bread")
    ]
    made, outcome = collected(tmp_path / "a", texts, 4)
    found = list(read_rows([made.out / collect.PROMPTS], Prompt))
    assert [row.prompt_id for row in found] == ["0.0", "1.0", "2.0", "0.1"]
    assert found[0].messages == [Message("user", "Write one about the sea.")]
    assert dict(outcome.counts) == {"wanted": 4, "kept": 4, "dropped_surplus": 5}


def test_what_two_shards_made_alike_is_kept_once_and_others_stand_in(tmp_path: Path) -> None:
    same = "Explain why bread rises when yeast is added to the dough, in simple words."
    texts = [[same, "Name a tree."], [same.upper(), same.replace("simple", "few"), "Say a word."]]
    made, outcome = collected(tmp_path / "a", texts, 3)
    assert [row.prompt_id for row in read_rows([made.out / collect.PROMPTS], Prompt)] == ["0.0", "0.1", "1.2"]
    assert outcome.counts["dropped_same_as_new"] == outcome.counts["dropped_nearly_same_as_new"] == 1


def test_too_few_prompts_go_on_down_to_the_least_share_and_stop_the_run_below_it(tmp_path: Path) -> None:
    texts = [["Name a tree."], [], ["Say a word.", "Count the stars."]]
    _, outcome = collected(tmp_path / "a", texts, 6, min_share=0.5)
    assert dict(outcome.counts) == {"wanted": 6, "kept": 3}
    with pytest.raises(DataError) as raised:
        collected(tmp_path / "b", texts, 6, min_share=0.6)
    assert str(raised.value).startswith(
        "iter-00/collect: self-instruct made 3 prompts, which is less than instruct.min_share=0.6 of instruct.num_prompts=6"
    )
