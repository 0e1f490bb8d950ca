"""drive=once, for cron: each call looks, sends what can be sent, and leaves; together they bring a run to its end."""

from dataclasses import replace
from pathlib import Path

import pytest
from fakes import SLURM_LIKE, ScriptedCluster

from aipo_hpc.clusters import TaskState
from aipo_hpc.errors import RunFailed
from aipo_hpc.launch import launch
from aipo_hpc.recipe import Recipe
from aipo_hpc.sentinel import Failure
from aipo_hpc.store import Run

GENERATE = "iter-00/generate"


@pytest.fixture
def once(small_recipe: Recipe) -> Recipe:
    return replace(small_recipe, iterations=1, drive="once")


@pytest.fixture
def cluster() -> ScriptedCluster:
    return ScriptedCluster(limits=replace(SLURM_LIKE, settle=0.2))


def sent(cluster: ScriptedCluster) -> list[tuple[int, ...]]:
    return [each.shards for each in cluster.taken if each.job == GENERATE]


def test_an_element_that_ended_without_a_word_is_sent_again_by_the_next_call(
    once: Recipe, cluster: ScriptedCluster
) -> None:
    launch(once, cluster)
    (first,) = [each for each in cluster.taken if each.job == GENERATE]
    launch(once, cluster)
    assert sent(cluster) == [first.shards], "it waits: nothing to do"
    cluster.told[first.name] = {0: TaskState(alive=False, kind="preempted")}
    launch(once, cluster)
    assert sent(cluster) == [first.shards, (0,)], "the call stayed until it was known what became of the element"


def test_what_was_given_up_stays_so_until_the_user_types_the_command(once: Recipe, cluster: ScriptedCluster) -> None:
    run: Run = launch(once, cluster)
    (first,) = [each for each in cluster.taken if each.job == GENERATE]
    reason = Failure(GENERATE, 0, f"{first.name}.0.r0", first.fence, "user_error", "mend it")
    run.job(GENERATE).record_failure(reason)
    cluster.told[first.name] = {index: TaskState(alive=False, kind="cancelled") for index in range(len(first.shards))}
    for _ in range(3):
        launch(once, cluster)
    assert not any(0 in shards for shards in sent(cluster)[1:])
    launch(replace(once, drive="prepare"))
    launch(once, cluster)
    assert any(0 in shards for shards in sent(cluster)[1:]), "typed by the user, it is tried again"


def test_a_run_that_cannot_go_on_says_so(once: Recipe, cluster: ScriptedCluster, tmp_path: Path) -> None:
    run: Run = launch(once, cluster)
    for each in cluster.taken:
        cluster.told[each.name] = {index: TaskState(alive=False, kind="cancelled") for index in range(len(each.shards))}
        for index, shard in enumerate(each.shards):
            reason = Failure(each.job, shard, f"{each.name}.{index}.r0", each.fence, "user_error", "mend it")
            run.job(each.job).record_failure(reason)
    with pytest.raises(RunFailed, match="cannot go on"):
        launch(once, cluster)
