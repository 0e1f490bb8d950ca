"""Which prompts a call shows."""

from collections import Counter

from aipo_hpc.rows import Message, Prompt
from aipo_hpc.seed_pool import SeedPool, of_shard


def prompts(name: str, number: int) -> list[Prompt]:
    return [Prompt(f"{name}{index}", f"{name} {index}", [Message("user", name)]) for index in range(number)]


POOL = prompts("p", 40)


def names(drawn: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in drawn]


def test_a_draw_depends_on_the_calls_seed_alone_and_repeats_no_prompt() -> None:
    pool = SeedPool(POOL, [], {}, lambda text: True)
    first = names(pool.draw(0, 11, 8, 0).prompts)
    pool.draw(1, 12, 8, 0)
    assert names(pool.draw(5, 11, 8, 0).prompts) == first
    assert names(pool.draw(0, 12, 8, 0).prompts) != first
    assert len(set(first)) == 8


def test_every_prompt_is_drawn_about_equally_often() -> None:
    pool = SeedPool(POOL, [], {}, lambda text: True)
    drawn = Counter(name for seed in range(1000) for name in names(pool.draw(0, seed, 8, 0).prompts))
    assert len(drawn) == 40
    assert all(140 < number < 260 for number in drawn.values()), drawn


def test_prompts_that_do_not_fit_are_passed_over() -> None:
    pool = SeedPool(POOL, [], {}, lambda text: int(text.split()[1]) % 10 == 0)
    assert sorted(names(pool.draw(0, 3, 8, 0).prompts)) == ["p0", "p10", "p20", "p30"]


def test_machine_made_seeds_are_as_many_as_asked_for_once_there_are_any() -> None:
    with_made = SeedPool(POOL, prompts("m", 5), {}, lambda text: True)
    drawn = names(with_made.draw(0, 4, 8, 2).prompts)
    assert sorted(name[0] for name in drawn) == ["m"] * 2 + ["p"] * 6
    assert all(name[0] == "p" for name in names(with_made.draw(0, 4, 8, 0).prompts))
    assert all(name[0] == "p" for name in names(SeedPool(POOL, [], {}, lambda text: True).draw(0, 4, 8, 2).prompts))


def test_machine_made_seeds_have_no_place_of_their_own() -> None:
    pool = SeedPool(POOL, prompts("m", 5), {}, lambda text: True)
    places = {
        place
        for seed in range(50)
        for place, name in enumerate(names(pool.draw(0, seed, 4, 1).prompts))
        if name[0] == "m"
    }
    assert places == {0, 1, 2, 3}


def test_seeds_come_from_one_cluster_at_a_time_topped_up_where_it_is_too_small() -> None:
    clusters = {3: POOL[:10], 7: POOL[10:12]}
    pool = SeedPool(POOL, [], clusters, lambda text: True)
    assert [pool.cluster(call) for call in range(4)] == [3, 7, 3, 7]
    first, second = pool.draw(0, 1, 8, 0), pool.draw(1, 1, 8, 0)
    assert first.cluster == 3 and set(names(first.prompts)) <= {f"p{index}" for index in range(10)}
    assert second.cluster == 7 and {"p10", "p11"} < set(names(second.prompts)) and len(second.prompts) == 8


def test_every_cluster_belongs_to_one_shard_and_no_shard_is_without() -> None:
    clusters = {number: POOL[number : number + 1] for number in range(7)}
    assert [sorted(of_shard(clusters, shard, 3)) for shard in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [sorted(of_shard(clusters, shard, 9)) for shard in range(9)] == [list(range(7))] * 9
    assert of_shard({}, 0, 2) == {}
