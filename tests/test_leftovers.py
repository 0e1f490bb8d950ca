"""Which shards get more tasks: tables of a look at the world and the extra tasks expected."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import Clock, ScriptedCluster, driven, write_run
from slow_stage import JOB, SlowConfig, slow_graph

from aipo_hpc.adjustment import Adjustment
from aipo_hpc.claims import Claims
from aipo_hpc.clusters import Limits, Submission, TaskState
from aipo_hpc.decision import Decision, Sharing, Submit, View
from aipo_hpc.failures import standings
from aipo_hpc.leftovers import LEAST, last_shards
from aipo_hpc.reconcile import reconcile
from aipo_hpc.resources import Resources
from aipo_hpc.sentinel import Failure, Sentinel
from aipo_hpc.store import Run

NOW = 10_000.0
SLURM = Limits(dependencies=True, max_array_size=1000, settle=15.0, query_interval=0.0)
ONE_MACHINE = Limits(dependencies=False, max_array_size=1, settle=1.0, query_interval=0.0, cpus=3, gpus=0)
OWN = Submission("s-1", JOB, tuple(range(10)), (), 1, 1000.0, "1")


def ran(seconds: float | None) -> TaskState:
    return TaskState(alive=True, running=True, seconds=seconds)


def view(state: TaskState, **sharing: Any) -> View:
    """Nine of ten shards took 200 s; shard 3 is in this state, with 20 blocks that nobody has begun."""
    shared = Sharing(took={JOB: [200.0] * 9}, unclaimed={JOB: {3: 20}})
    return View(
        {JOB: set(range(10)) - {3}}, {}, (OWN,), {"s-1": {3: state}}, NOW, {}, 1, NOW, shared=replace(shared, **sharing)
    )


def decide(
    look: View, config: SlowConfig | None = None, num_shards: int = 10, limits: Limits = SLURM
) -> tuple[Submit, ...]:
    return told(look, config, num_shards, limits).submit


def told(look: View, config: SlowConfig | None = None, num_shards: int = 10, limits: Limits = SLURM) -> Decision:
    return reconcile(slow_graph(num_shards, config or SlowConfig()), look, limits)


def extra(name: str, tasks: int, fence: int = 1) -> Submission:
    return Submission(name, JOB, (3,) * tasks, (), fence, 9000.0, "2", extra=True)


def test_a_last_shard_that_runs_long_gets_what_the_finished_ones_left_free() -> None:
    assert decide(view(ran(301))) == (Submit(JOB, (3,) * 9, extra=True),)


@pytest.mark.parametrize(
    ("look", "why"),
    [
        (view(ran(299)), "it does not run longer than 1.5 times the median"),
        (view(TaskState(alive=True, seconds=900)), "it does not run"),
        (view(ran(900), unclaimed={JOB: {3: 1}}), "there is nothing to be shared"),
        (view(ran(900), unclaimed={JOB: {3: 0}}), "all of it is begun"),
        (view(ran(900), unclaimed={}), "it cannot be shared"),
        (view(ran(900), took={}), "nothing is known of how long a shard takes"),
        (view(ran(900), extra=(extra("s-2", 4),)), "it was shared already"),
        (view(TaskState(alive=False, kind="killed")), "it is over, and sent again soon"),
    ],
)
def test_a_shard_is_left_alone(look: View, why: str) -> None:
    assert not [submit for submit in decide(look) if submit.extra], why


def test_a_shard_must_have_run_for_some_time_where_all_are_short() -> None:
    assert decide(view(ran(LEAST - 1), took={JOB: [1.0] * 9})) == ()
    assert len(decide(view(ran(LEAST + 1), took={JOB: [1.0] * 9}))) == 1


def test_sharing_is_a_setting_and_can_be_turned_off() -> None:
    assert decide(view(ran(100_000)), SlowConfig(share_after=None)) == ()
    assert decide(view(ran(601)), SlowConfig(share_after=4.0)) == ()
    assert len(decide(view(ran(801)), SlowConfig(share_after=4.0))) == 1


def test_time_since_the_scheduler_was_asked_counts() -> None:
    look = replace(view(ran(250)), queried=NOW - 60)
    assert len(decide(look)) == 1


def test_where_there_is_no_queue_a_shard_runs_since_it_was_sent_and_tasks_go_one_by_one_as_they_fit() -> None:
    look = replace(view(ran(None)), submissions=(replace(OWN, shards=(3,)),), states={"s-1": {0: ran(None)}})
    assert decide(look, limits=ONE_MACHINE) == (Submit(JOB, (3,), extra=True),) * 2, "two cores are free"
    late = replace(look, submissions=(replace(OWN, shards=(3,), time=NOW - 250),))
    assert decide(late, limits=ONE_MACHINE) == ()


def test_no_more_tasks_than_there_may_be_at_once_or_than_have_two_blocks_each() -> None:
    few = SlowConfig(resources=Resources(array_parallelism=4))
    assert decide(view(ran(900)), few) == (Submit(JOB, (3,) * 3, extra=True),)
    assert decide(view(ran(900), unclaimed={JOB: {3: 5}})) == (Submit(JOB, (3, 3), extra=True),)


def test_two_last_shards_of_many_share_what_is_free_and_three_are_not_the_last() -> None:
    def look(*missing: int) -> View:
        shared = Sharing(took={JOB: [200.0] * 30}, unclaimed={JOB: dict.fromkeys(missing, 100)})
        own = replace(OWN, shards=tuple(range(40)))
        states = {"s-1": dict.fromkeys(missing, ran(900))}
        return View({JOB: set(range(40)) - set(missing)}, {}, (own,), states, NOW, {}, 1, NOW, shared=shared)

    assert decide(look(3, 7), num_shards=40) == (
        Submit(JOB, (3,) * 19, extra=True), Submit(JOB, (7,) * 19, extra=True),
    )  # fmt: skip
    (job,) = slow_graph(40, SlowConfig()).jobs.values()
    assert last_shards(job, set(range(40)) - {3, 7}) == [3, 7]
    assert last_shards(job, set(range(40)) - {3, 7, 8}) == []


def test_extra_tasks_ask_for_what_the_shard_asks_for() -> None:
    more = Adjustment(memory=1.5, exclude=("n3",))
    look = replace(view(ran(900)), submissions=(replace(OWN, adjustment=more),))
    assert decide(look)[0].adjustment == more


def test_a_shard_is_shared_once_in_a_launch_and_again_in_the_next() -> None:
    before = view(ran(900), extra=(extra("s-2", 4),))
    assert decide(before) == ()
    over = {"s-2": dict.fromkeys(range(4), TaskState(alive=False, kind="killed"))}
    gone = replace(before, fence=2, states={**before.states, **over}, over_since={("s-2", n): 0.0 for n in range(4)})
    record = told(gone).record
    assert [each.submission for each in record] == ["s-2"] * 4, "its ends are recorded first"
    failures = [
        Failure(JOB, 3, f"s-2.{number}.driver", 1, "killed", "", time=9500.0, extra=True) for number in range(4)
    ]
    assert len(decide(replace(gone, failures={JOB: failures}))) == 1


def test_what_became_of_extra_tasks_is_not_held_against_the_shard() -> None:
    killed = [Failure(JOB, 3, f"s-2.{number}.r0", 1, "user_error", "", extra=True) for number in range(9)]
    assert standings(killed, 1) == {}
    assert not told(replace(view(ran(100)), failures={JOB: killed})).given_up


def test_an_extra_task_that_ended_without_a_word_is_recorded_and_one_that_left_is_not() -> None:
    ended = TaskState(alive=False, kind="killed", detail="Slurm: FAILED")
    since = {("s-2", number): NOW - 60 for number in range(3)}
    look = view(ran(900), extra=(extra("s-2", 3),), left={("s-2", 1)})
    look = replace(look, states={**look.states, "s-2": {0: ran(5), 1: ended, 2: ended}}, over_since=since)
    (record,) = told(look).record
    assert (record.submission, record.index, record.shard) == ("s-2", 2, 3)
    settling = told(replace(look, over_since={("s-2", 2): NOW - 1}))
    assert settling.record == () and settling.settling, "its last files may not be visible yet"


def test_extra_tasks_take_room_on_a_machine_without_a_queue() -> None:
    """Three cores: the straggler's and an extra task's leave one."""
    own = replace(OWN, shards=(3,))
    states = {"s-1": {0: ran(None)}, "s-2": {0: ran(None)}}
    shared = Sharing(took={JOB: [1.0] * 8}, extra=(replace(extra("s-2", 1), shards=(3,)),))
    look = View({JOB: set(range(10)) - {3, 4, 5}}, {}, (own,), states, NOW, {}, 1, NOW, shared=shared)
    assert decide(look, limits=ONE_MACHINE) == (Submit(JOB, (4,)),)


# -- the driver --------------------------------------------------------------------------------------------------------------


def test_the_driver_sends_extra_tasks_knows_them_again_and_ends_them_when_the_shard_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(now=time.time() + 60).install(monkeypatch)  # later than what the journal says of its own writing
    graph = slow_graph(4, SlowConfig())
    run = write_run(tmp_path / "run", graph)
    cluster = ScriptedCluster()

    def finish(shard: int) -> None:
        run.job(JOB).publish(Sentinel(JOB, shard, graph.fingerprints[JOB], "one", 1, 1, (), {}, {}, 1.0, 2.0, "here"))

    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        (own,) = cluster.taken
        for shard in range(3):
            finish(shard)
        cluster.told[own.name] = {3: ran(200)}
        clock.sleep(1)
        at_work.driver.tick()
        assert cluster.taken == [own], "its task has not begun to claim"
        claims = Claims(run.job(JOB), 3, f"{own.name}.3.r0", graph.fingerprints[JOB])
        claims.open(10)
        claims.take(range(10))
        at_work.driver.tick()
        (_, extra) = cluster.taken
        assert (extra.shards, extra.extra) == ((3, 3, 3), True)
        assert at_work.lines[-1] == f"{JOB}: sent 3 more for shard 3 as 2"
    with driven(Run(run.path), graph, cluster) as later:
        clock.sleep(1)
        later.driver.tick()
        assert cluster.taken == [own, extra], "they are known"
        assert "2" in later.driver.outstanding(), "a chain's next step is told of their end"
        cluster.told[extra.name] = {0: ran(9), 1: ran(9), 2: TaskState(alive=False, kind="out_of_memory")}
        for _ in range(20):
            clock.sleep(1)
            later.driver.tick()
        (failure,) = run.job(JOB).failures()
        assert (failure.extra, failure.shard, failure.kind) == (True, 3, "out_of_memory")
        assert f"{JOB} shard 3, an extra task: out_of_memory" in later.lines[0]
        assert later.lines[1:] == [f"{JOB}: sent 1 more for shard 3 as 3"], (
            "a new launch sends once more, if there is room"
        )
        finish(3)
        assert later.driver.tick().finished
        assert cluster.cancelled == [each.name for each in cluster.taken[1:]]
