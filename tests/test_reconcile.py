"""What to do next: tables of a graph, a look at the world, a cluster's limits, and the actions expected."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from fakes import SLURM_LIKE, TouchConfig, chain, touch

from aipo_hpc.adjustment import Adjustment
from aipo_hpc.clusters import Dependency, Limits, Submission, TaskState
from aipo_hpc.decision import Decision, Submit, View
from aipo_hpc.failures import FAST, KINDS
from aipo_hpc.graph import Graph, make_graph
from aipo_hpc.living import LOST_AFTER, MOST_NAMED
from aipo_hpc.reconcile import reconcile
from aipo_hpc.resources import Resources
from aipo_hpc.sentinel import Failure

A, B, C = "iter-00/a", "iter-00/b", "iter-00/c"
NOW = 1000.0
ALL = range(4)
NO_QUEUE = Limits(dependencies=False, max_array_size=1, settle=1.0, query_interval=0.0, cpus=4, gpus=2)

WAITS, RUNS = TaskState(alive=True), TaskState(alive=True, running=True)
ENDED = TaskState(alive=False)


def over(kind: str) -> TaskState:
    return TaskState(alive=False, kind=kind, detail=f"told as {kind}")


def sent(
    name: str, job: str, shards: Iterable[int], *after: Dependency, at: float = 900.0, id: str | None = "1"
) -> Submission:
    return Submission(name, job, tuple(shards), after, 1, at, id)


def all_of(submission: Submission, state: TaskState) -> dict[str, dict[int, TaskState]]:
    return {submission.name: dict.fromkeys(range(len(submission.shards)), state)}


def failed(shard: int, kind: str, attempt: str, job: str = A, fence: int = 1) -> Failure:
    return Failure(job, shard, attempt, fence, kind, f"{kind} it was", time=float(hash(attempt) % 100))


def view(**given: Any) -> View:
    """A look in which nothing has happened yet, but for what is given."""
    nothing = View({}, {}, (), {}, queried=NOW, over_since={}, fence=1, now=NOW)
    return replace(nothing, **given)


def decide(graph: Graph, limits: Limits = SLURM_LIKE, **given: Any) -> Decision:
    return reconcile(graph, view(**given), limits)


# -- what is missing is sent, and only that --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ({}, (Submit(A, (0, 1, 2, 3)),)),
        ({A: {1}}, (Submit(A, (0, 2, 3)), Submit(B, (1,)))),
        ({A: {0, 1, 2, 3}}, (Submit(B, (0, 1, 2, 3)),)),
        ({A: {0, 1, 2, 3}, B: {0, 3}}, (Submit(B, (1, 2)),)),
        ({A: {0, 1, 2, 3}, B: {0, 1, 2, 3}}, (Submit(C, (0,)),)),
        ({A: {0, 2, 3}, B: {0, 1, 2, 3}}, (Submit(A, (1,)), Submit(C, (0,)))),
    ],
)
def test_only_missing_shards_whose_inputs_are_done_are_sent(
    done: dict[str, set[int]], expected: tuple[Submit, ...]
) -> None:
    for limits in (SLURM_LIKE, replace(SLURM_LIKE, dependencies=False)):
        decision = decide(chain(), limits, done=done)
        assert decision.submit == expected
        assert not (decision.record or decision.given_up or decision.finished or decision.stuck)


def test_a_job_of_the_launch_itself_is_never_sent_but_counts_for_the_end() -> None:
    here = replace(touch("iter-00/prompts"), resources=None)
    graph = make_graph([here, touch(A, source=("iter-00/prompts", "all"))])
    assert decide(graph).submit == ()
    assert decide(graph, done={"iter-00/prompts": {0}}).submit == (Submit(A, (0,)),)
    assert not decide(graph, done={A: {0}}).finished
    assert decide(graph, done={A: {0}, "iter-00/prompts": {0}}).finished


def test_a_run_is_finished_when_each_shard_of_each_job_is_done() -> None:
    everything: dict[str, set[int]] = {A: {*ALL}, B: {*ALL}, C: {0}}
    decision = decide(chain(), done=everything)
    assert decision.finished and not decision.stuck and decision.submit == ()
    for job, shards in everything.items():
        for shard in shards:
            assert not decide(chain(), done={**everything, job: shards - {shard}}).finished


def test_a_sentinel_counts_whatever_the_scheduler_says() -> None:
    array = sent("s-1", A, ALL)
    for state in (WAITS, RUNS, ENDED, over("killed"), over("lost")):
        decision = decide(chain(), done={A: {*ALL}}, submissions=(array,), states=all_of(array, state))
        assert decision.submit == (Submit(B, (0, 1, 2, 3)),)
        assert decision.record == () and decision.alive == {}


# -- what lives is left alone ----------------------------------------------------------------------------------------


def test_living_elements_are_adopted_and_only_the_others_are_sent() -> None:
    array = sent("s-1", A, (0, 2))
    decision = decide(chain(), submissions=(array,), states={"s-1": {0: RUNS, 1: WAITS}})
    assert decision.submit == (Submit(A, (1, 3)), Submit(B, (0, 2), (Dependency("s-1", "aftercorr"),)))
    assert decision.alive == {A: {0: True, 2: False}}


@pytest.mark.parametrize("queried", [NOW - 500, NOW - 100])
def test_nothing_is_concluded_of_a_submission_from_an_answer_older_than_it(queried: float) -> None:
    array = sent("s-1", A, ALL, at=NOW - 100)
    for states in ({}, all_of(array, ENDED), all_of(array, over("killed"))):
        decision = decide(chain(), submissions=(array,), states=states, queried=queried)
        assert decision.record == () and decision.alive[A].keys() == {*ALL}
        assert A not in {submit.job for submit in decision.submit}


def test_an_intent_without_an_answer_is_not_sent_again_while_it_may_be_there() -> None:
    array = sent("s-1", A, ALL, id=None)
    first_seen = {("s-1", index): NOW - 1 for index in ALL}
    decision = decide(chain(), submissions=(array,), over_since=first_seen)
    assert decision.submit == () and decision.record == () and not decision.stuck


def test_what_the_scheduler_does_not_know_is_neither_done_nor_failed_until_it_was_looked_for_long_enough() -> None:
    array = sent("s-1", A, ALL, at=100.0)
    for unknown_for, lost in ((0.0, False), (LOST_AFTER - 1, False), (LOST_AFTER, True)):
        since = {("s-1", index): NOW - unknown_for for index in ALL}
        decision = decide(chain(), submissions=(array,), over_since=since)
        assert {record.kind for record in decision.record} == ({"lost"} if lost else set())
        assert decision.submit == () and not decision.stuck


def test_time_in_which_the_scheduler_was_silent_makes_nothing_lost() -> None:
    array = sent("s-1", A, ALL, at=100.0)
    since = {("s-1", index): 500.0 for index in ALL}
    decision = decide(chain(), submissions=(array,), over_since=since, queried=501.0, now=NOW)
    assert decision.record == () and decision.alive[A].keys() == {*ALL}


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (ENDED, "no_sentinel"),
        (over("killed"), "killed"),
        (over("preempted"), "preempted"),
        (over("timeout"), "timeout"),
    ],
)
def test_an_element_that_ended_without_a_word_gets_its_failure_recorded_once_files_have_had_time(
    state: TaskState, kind: str
) -> None:
    array = sent("s-1", A, (1, 3))
    states = {"s-1": {0: RUNS, 1: state}}
    early = decide(chain(), submissions=(array,), states=states, over_since={("s-1", 1): NOW - 14})
    assert early.record == () and early.alive == {A: {1: True, 3: False}}
    (record,) = decide(chain(), submissions=(array,), states=states, over_since={("s-1", 1): NOW - 15}).record
    assert (record.submission, record.job, record.shard, record.index, record.kind) == ("s-1", A, 3, 1, kind)
    assert record.message == (f"told as {kind}" if state.detail else KINDS[kind].advice)


def test_nothing_is_sent_in_the_look_that_records_a_failure() -> None:
    array = sent("s-1", A, (0,))
    given = {"submissions": (array,), "states": all_of(array, over("killed")), "over_since": {("s-1", 0): 0.0}}
    decision = decide(chain(), **given)
    assert len(decision.record) == 1 and decision.submit == () and not decision.stuck


def test_an_element_whose_failure_was_recorded_for_the_scheduler_is_over_whatever_it_says_later() -> None:
    array = sent("s-1", A, ALL)
    failures = {A: [failed(2, "error", "s-1.2.driver")]}
    decision = decide(chain(), submissions=(array,), states=all_of(array, RUNS), failures=failures)
    assert Submit(A, (2,)) in decision.submit and decision.record == ()


@pytest.mark.parametrize(
    ("state", "queried", "gated"),
    [
        (RUNS, NOW, True),
        (WAITS, NOW, True),
        (over("killed"), NOW - 50, True),
        (over("killed"), NOW, False),
        (ENDED, NOW, False),
        (None, NOW, False),
    ],
)
def test_a_task_that_said_why_it_failed_is_replaced_behind_itself_until_the_scheduler_calls_it_over(
    state: TaskState | None, queried: float, gated: bool
) -> None:
    """It may be on its way out, or have been requeued: a second one beside it would do its work twice."""
    array = sent("s-1", A, (1, 2))
    states = {"s-1": {0: RUNS} if state is None else {0: RUNS, 1: state}}
    failures = {A: [failed(2, "error", "s-1.1.r0")]}
    given: dict[str, Any] = {
        "queried": queried, "failed_since": {("s-1", 1): NOW - 20}, "done": {A: {0, 3}}, "submissions": (array,),
        "states": states, "failures": failures,
    }  # fmt: skip
    behind = (Dependency("s-1", "afterany", (1,)),) if gated else ()
    decision = decide(chain(), **given)
    assert decision.submit[0] == Submit(A, (2,), behind) and decision.record == () and not decision.stuck
    alone = decide(chain(), replace(SLURM_LIKE, dependencies=False), **given)
    assert (Submit(A, (2,)) in alone.submit) == (not gated), "where the cluster knows no dependency, it is waited for"
    unnamed = decide(chain(), **{**given, "submissions": (replace(array, id=None),)})
    assert (Submit(A, (2,)) in unnamed.submit) == (not gated), "nor can it be named without an id"


def test_of_many_that_failed_together_each_is_waited_for() -> None:
    many = range(MOST_NAMED + 1)
    array = sent("s-1", A, many)
    failures = {A: [failed(shard, "error", f"s-1.{shard}.r0") for shard in many]}
    given = {"failures": failures, "submissions": (array,), "states": all_of(array, RUNS)}
    assert decide(chain(len(many)), **given).submit == ()
    over_now = {**given, "states": all_of(array, ENDED)}
    assert decide(chain(len(many)), **over_now).submit == (Submit(A, tuple(many)),)


def test_what_waits_in_vain_is_replaced_behind_itself_together_with_what_failed() -> None:
    arrays = (sent("s-1", A, ALL), sent("s-2", B, ALL, corr("s-1")), sent("s-3", A, (2,)))
    states = {**all_of(arrays[0], RUNS), **all_of(arrays[1], WAITS), **all_of(arrays[2], WAITS)}
    given: dict[str, Any] = {"submissions": arrays, "states": states, "queried": NOW}
    failures = {A: [failed(2, "error", "s-1.2.r0")]}
    behind = Dependency("s-2", "afterany", (2,))
    decision = decide(chain(), failures=failures, **given)
    assert decision.submit == (Submit(B, (2,), (ok("s-3"), behind)),)
    assert decide(chain(), **given).submit == (), "nothing has failed, nothing waits in vain"
    runs = {**given, "states": {**states, "s-2": {**dict.fromkeys(ALL, WAITS), 2: RUNS}}}
    assert decide(chain(), failures=failures, **runs).submit == (), "it runs all the same: its input is there"
    damaged = {A: [failed(2, "damaged", "s-1.2.r0")]}
    assert B not in {submit.job for submit in decide(chain(), failures=damaged, **given).submit}


def test_a_job_that_needs_all_names_the_elements_of_an_array_that_has_failed_in_part() -> None:
    """As a whole it never succeeds: what waited for that would be cancelled and sent again, over and over."""
    arrays = (sent("s-1", B, ALL), sent("s-2", B, (3,)))
    states = {"s-1": {0: RUNS, 1: RUNS, 2: ENDED, 3: over("killed")}, "s-2": {0: RUNS}}
    failures = {B: [failed(3, "error", "s-1.3.r0")]}
    decision = decide(chain(), done={A: {*ALL}, B: {2}}, submissions=arrays, states=states, failures=failures)
    assert decision.submit == (Submit(C, (0,), (ok("s-2"), Dependency("s-1", "afterok", (0, 1)))),)


# -- overlap ---------------------------------------------------------------------------------------------------------


def corr(name: str) -> Dependency:
    return Dependency(name, "aftercorr")


def ok(name: str) -> Dependency:
    return Dependency(name, "afterok")


@pytest.mark.parametrize(
    ("arrays", "done", "expected"),
    [
        ([sent("s-1", A, ALL)], {}, [Submit(B, (0, 1, 2, 3), (corr("s-1"),))]),
        (
            [sent("s-1", A, (0, 1)), sent("s-2", A, (2, 3))],
            {},
            [Submit(B, (0, 1), (corr("s-1"),)), Submit(B, (2, 3), (corr("s-2"),))],
        ),
        (
            [sent("s-1", A, (0, 1, 3)), sent("s-2", A, (2,))],
            {},
            [Submit(B, (0, 1, 3), (corr("s-1"),)), Submit(B, (2,), (ok("s-2"),))],
        ),
        ([sent("s-1", A, ALL)], {A: {1}}, [Submit(B, (1,))]),
        ([sent("s-1", A, (2, 3))], {A: {0, 1}}, [Submit(B, (0, 1)), Submit(B, (2, 3), (corr("s-1"),))]),
        ([sent("s-1", A, ALL), sent("s-2", B, (0,))], {}, []),
        ([sent("s-1", A, ALL, id=None)], {}, []),
    ],
    ids=["same shards", "two arrays", "array and single", "one done", "leftovers", "one sent already", "id not known"],
)
def test_a_shard_is_sent_against_its_own_input_where_both_arrays_hold_the_same_shards(
    arrays: list[Submission], done: dict[str, set[int]], expected: list[Submit]
) -> None:
    states = {name: state for array in arrays for name, state in all_of(array, RUNS).items()}
    given = {"submissions": arrays, "states": states, "done": done}
    decision = decide(chain(), **given)
    assert [submit for submit in decision.submit if submit.job == B] == expected
    without = decide(chain(), replace(SLURM_LIKE, dependencies=False), **given)
    assert all(submit.after == () for submit in without.submit), "no dependency where the cluster knows none"


@pytest.mark.parametrize("state", [None, ENDED, over("killed")], ids=["unknown", "ended", "killed"])
def test_nothing_is_sent_against_what_the_scheduler_does_not_know_or_calls_over(state: TaskState | None) -> None:
    """Slurm takes a dependency on a purged id as fulfilled: the task would start at once and wait for files in vain."""
    array, single = sent("s-1", A, ALL), sent("s-1", B, (3,))
    for submission, done in ((array, {}), (single, {A: {*ALL}, B: {0, 1, 2}})):
        states = {} if state is None else all_of(submission, state)
        given = {"done": done, "submissions": (submission,), "over_since": {("s-1", index): NOW for index in ALL}}
        assert decide(chain(), states=states, **given).submit == ()


def test_a_job_that_needs_all_shards_waits_for_all_arrays_that_compute_them() -> None:
    arrays = (sent("s-1", B, (0, 1)), sent("s-2", B, (2,)))
    states = {**all_of(arrays[0], RUNS), **all_of(arrays[1], WAITS)}
    given = {"submissions": arrays, "states": states}
    decision = decide(chain(), done={A: {*ALL}, B: {3}}, **given)
    assert decision.submit == (Submit(C, (0,), (ok("s-1"), ok("s-2"))),)
    decision = decide(chain(), done={A: {*ALL}}, **given)
    assert decision.submit == (Submit(B, (3,)),), "c waits until shard 3 is sent as well"
    decision = decide(chain(), replace(SLURM_LIKE, dependencies=False), done={A: {*ALL}, B: {3}}, **given)
    assert decision.submit == ()


def test_what_waits_for_its_own_inputs_is_not_waited_for() -> None:
    arrays = (sent("s-1", A, ALL), sent("s-2", B, ALL, corr("s-1")))
    states = {**all_of(arrays[0], RUNS), **all_of(arrays[1], WAITS)}
    assert decide(chain(), submissions=arrays, states=states).submit == ()


def test_arrays_are_cut_at_the_largest_size_and_each_part_has_its_own_partner() -> None:
    limits = replace(SLURM_LIKE, max_array_size=3)
    graph = chain(num_shards=7)
    parts = ((0, 1, 2), (3, 4, 5), (6,))
    assert decide(graph, limits).submit == tuple(Submit(A, part) for part in parts)
    arrays = [sent(f"s-{number}", A, part) for number, part in enumerate(parts)]
    states = {name: state for array in arrays for name, state in all_of(array, WAITS).items()}
    assert decide(graph, limits, submissions=arrays, states=states).submit == (
        Submit(B, parts[0], (corr("s-0"),)),
        Submit(B, parts[1], (corr("s-1"),)),
        Submit(B, parts[2], (ok("s-2"),)),
    )


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind, what in KINDS.items() if what.tolerated < 100])
def test_a_shard_is_given_up_after_as_many_failures_as_its_class_tolerates(kind: str) -> None:
    tolerated = KINDS[kind].tolerated
    attempts = [failed(1, kind, f"s-{number}.1.r0") for number in range(tolerated + 1)]
    kept_on = decide(chain(), failures={A: attempts[:-1]})
    assert kept_on.given_up == () and sorted(sum((send.shards for send in kept_on.submit), ())) == [*ALL]
    ended = decide(chain(), failures={A: attempts})
    assert [(given.job, given.shard, given.failure.kind) for given in ended.given_up] == [(A, 1, kind)]
    assert ended.submit == (Submit(A, (0, 2, 3)),)


def test_classes_of_failure_have_budgets_of_their_own() -> None:
    mixed = [failed(0, kind, f"s-{kind}.0.r0") for kind, what in KINDS.items() if what.tolerated]
    assert decide(chain(), failures={A: mixed}).given_up == ()


def test_processes_of_one_gang_count_as_one_failure() -> None:
    gang = [failed(0, "user_error", "s-1.0.r0"), failed(0, "error", "s-2.0.r0"), *[failed(0, "error", "s-2.0.r0")] * 7]
    assert decide(chain(), failures={A: gang[1:]}).given_up == ()
    assert len(decide(chain(), failures={A: gang}).given_up) == 1


def test_failures_of_an_earlier_launch_are_forgiven() -> None:
    earlier = {A: [failed(1, "user_error", "s-1.1.r0", fence=1)]}
    assert decide(chain(), failures=earlier, fence=2).submit == (Submit(A, (0, 1, 2, 3)),)
    assert decide(chain(), failures=earlier, fence=1).submit == (Submit(A, (0, 2, 3)),)


def test_one_failed_shard_stops_neither_its_siblings_nor_what_does_not_need_it() -> None:
    failures = {A: [failed(1, "user_error", "s-1.1.r0")]}
    decision = decide(chain(), failures=failures, done={A: {0}})
    assert decision.submit == (Submit(A, (2, 3)), Submit(B, (0,)))
    assert not decision.stuck
    rest = decide(chain(), failures=failures, done={A: {0, 2, 3}, B: {0, 2}})
    assert rest.submit == (Submit(B, (3,)),) and not rest.stuck


def test_a_run_is_stuck_when_nothing_lives_and_nothing_can_be_sent() -> None:
    failures = {A: [failed(1, "user_error", "s-1.1.r0")]}
    done = {A: {0, 2, 3}, B: {0, 2}}
    array = sent("s-9", B, (3,))
    running = decide(chain(), failures=failures, done=done, submissions=(array,), states=all_of(array, RUNS))
    assert not running.stuck and running.given_up
    stuck = decide(chain(), failures=failures, done={**done, B: {0, 2, 3}})
    assert stuck.stuck and not stuck.finished
    assert [(given.job, given.shard) for given in stuck.given_up] == [(A, 1)]


def test_a_shard_that_was_done_after_all_is_not_given_up() -> None:
    failures = {A: [failed(1, "user_error", "s-1.1.r0")]}
    assert decide(chain(), failures=failures, done={A: {1}}).given_up == ()


# -- a machine without a queue ---------------------------------------------------------------------------------------


def shapes(*resources: Resources) -> Graph:
    return make_graph(
        [touch(f"iter-00/j{number}", 1, TouchConfig(resources=each)) for number, each in enumerate(resources)]
    )


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ([Resources(cpus_per_task=2)] * 3, [0, 1]),
        ([Resources(cpus_per_task=3), Resources(cpus_per_task=2), Resources(cpus_per_task=1)], [0, 2]),
        ([Resources(cpus_per_task=64), Resources(cpus_per_task=1)], [0]),
        ([Resources(cpus_per_task=1), Resources(cpus_per_task=64), Resources(cpus_per_task=3)], [0, 2]),
        ([Resources(cpus_per_task=2, tasks_per_node=2), Resources()], [0]),
        ([Resources(gpus_per_node=1)] * 3, [0, 1]),
        ([Resources(gpus_per_node=2), Resources(gpus_per_node=1), Resources()], [0, 2]),
    ],
    ids=["cores", "what fits is sent past what does not", "more cores than there are: all of them",
         "all of them are waited for", "cores of all processes", "GPUs", "no GPU needed"],
)  # fmt: skip
def test_without_a_queue_only_what_fits_on_the_machine_is_started(
    resources: list[Resources], expected: list[int]
) -> None:
    submits = decide(shapes(*resources), NO_QUEUE).submit
    assert [submit.job for submit in submits] == [f"iter-00/j{number}" for number in expected]


def test_without_a_queue_what_lives_takes_room() -> None:
    graph = chain(num_shards=8, config=TouchConfig(resources=Resources(cpus_per_task=1, gpus_per_node=1)))
    one = sent("s-1", A, (5,))
    decision = decide(graph, NO_QUEUE, submissions=(one,), states=all_of(one, RUNS))
    assert decision.submit == (Submit(A, (0,)),), "one of two GPUs is left"


def test_without_a_queue_nothing_is_started_beside_more_than_the_machine_holds() -> None:
    graph = shapes(*[Resources(cpus_per_task=3)] * 2, Resources())
    living = [sent(f"s-{number}", f"iter-00/j{number}", (0,)) for number in (0, 1)]
    states = {name: state for each in living for name, state in all_of(each, RUNS).items()}
    assert decide(graph, NO_QUEUE, submissions=living, states=states).submit == ()


def test_ten_thousand_shards_are_sent_as_arrays_of_what_is_missing() -> None:
    graph = chain(num_shards=10_000)
    done = {A: set(range(10_000)) - {3, 5_000, 9_999}}
    first, *others = decide(graph, done=done).submit
    assert first == Submit(A, (3, 5_000, 9_999))
    assert sum(len(submit.shards) for submit in others) == 9_997 and len(others) == 10


# -- a scheduler that takes only so many jobs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "done", "expected", "held"),
    [
        (0, {}, (), True),
        (3, {}, (Submit(A, (0, 1, 2)),), True),
        (4, {}, (Submit(A, (0, 1, 2, 3)),), False),
        (3, {A: {2, 3}}, (Submit(A, (0, 1)), Submit(B, (2,))), True),
    ],
)
def test_no_more_is_sent_than_there_is_room_for(
    room: int, done: dict[str, set[int]], expected: tuple[Submit, ...], held: bool
) -> None:
    decision = decide(chain(), done=done, room=room)
    assert decision.submit == expected
    assert decision.held == held
    assert not decision.stuck


def test_an_array_that_waits_element_by_element_is_not_cut_to_the_room() -> None:
    living = sent("s-1", A, range(4))
    given = {"submissions": (living,), "states": all_of(living, RUNS)}
    assert [each.job for each in decide(chain(), **given, room=4).submit] == [B]
    held = decide(chain(), **given, room=3)
    assert held.submit == () and held.held


# -- trying again ----------------------------------------------------------------------------------------------------


def test_a_failed_shard_waits_for_its_turn_without_holding_up_the_others_and_the_run_is_not_stuck() -> None:
    failures = {A: [replace(failed(1, "error", "s-1.1.r0"), time=NOW - 1.5)]}
    done = {A: {0, 2, 3}, B: {0, 2, 3}}
    decision = decide(chain(), done=done, failures=failures)
    assert decision.submit == () and not decision.stuck
    assert decision.waiting == {A: {1: NOW + 0.5}}
    later = decide(chain(), done=done, failures=failures, now=NOW + 0.5)
    assert later.submit == (Submit(A, (1,)),) and later.waiting == {}


def test_failed_shards_whose_turns_come_at_almost_the_same_time_are_sent_together() -> None:
    times = (NOW - 2.0, NOW - 1.5, NOW - 0.5)
    failures = {A: [replace(failed(n, "error", f"s-1.{n}.r0"), time=time) for n, time in enumerate(times)]}
    decision = decide(chain(), done={A: {3}, B: {3}}, failures=failures)
    assert decision.submit == (Submit(A, (0, 1)),) and decision.waiting == {A: {2: NOW + 1.5}}
    before = decide(chain(), done={A: {3}, B: {3}}, failures=failures, now=NOW - 0.25)
    assert before.submit == () and len(before.waiting[A]) == 3, "none is early where none is due"


def test_shards_that_ask_for_the_same_are_sent_together() -> None:
    failures = {A: [failed(0, "out_of_memory", "s-1.0.r0"), failed(2, "out_of_memory", "s-1.2.r0")]}
    larger = Adjustment(memory=1.5, batch=2)
    expected = [Submit(A, (0, 2), adjustment=larger), Submit(A, (1, 3))]
    assert sorted(decide(chain(), failures=failures).submit, key=lambda send: send.shards) == expected


def test_a_bad_node_is_kept_off_by_all_that_is_sent_and_its_victims_are_tried_again() -> None:
    on_n1 = {"node": "n1", "seconds": 2.0}
    failures = {A: [replace(failed(shard, "user_error", f"s-1.{shard}.r0"), **on_n1) for shard in (0, 1, 2)]}
    lonely = decide(chain(), failures=failures)
    assert {given.shard for given in lonely.given_up} == {0, 1, 2} and lonely.bad_nodes == {}
    decision = decide(chain(), failures=failures, done={A: {3}}, nodes={A: {"n2"}})
    assert decision.given_up == () and decision.bad_nodes.keys() == {"n1"}
    assert Submit(A, (0, 1, 2), adjustment=Adjustment(exclude=("n1",))) in decision.submit
    assert all(send.adjustment.exclude == ("n1",) for send in decision.submit)


def test_shards_that_run_elsewhere_for_long_speak_against_a_node_as_finished_ones_do() -> None:
    failures = {A: [replace(failed(shard, "error", f"s-1.{shard}.r0"), node="n1", seconds=2.0) for shard in (0, 1, 2)]}
    for seconds, bad in ((FAST + 1, {"n1"}), (FAST - 1, set())):
        runs = {"s-2": {0: TaskState(alive=True, running=True, node="n2", seconds=seconds)}}
        decision = decide(chain(), failures=failures, submissions=(sent("s-2", A, (3,)),), states=runs)
        assert decision.bad_nodes.keys() == bad


def test_the_record_of_a_silent_death_tells_the_node_and_how_long_it_ran() -> None:
    state = TaskState(alive=False, kind="node_failure", detail="Slurm: NODE_FAIL", node="n3", seconds=70)
    given = {"submissions": (sent("s-1", A, (0,)),), "states": {"s-1": {0: state}}, "over_since": {("s-1", 0): 0.0}}
    (record,) = decide(chain(), **given).record
    assert (record.node, record.seconds) == ("n3", 70)


# -- what is known to be lost before the scheduler says so -----------------------------------------------------------


def test_an_element_that_never_ran_because_its_input_failed_is_sent_again_without_waiting_for_files() -> None:
    waiting = sent("s-2", B, (0,))
    decision = decide(chain(), submissions=(waiting,), states=all_of(waiting, over("dependency")))
    assert [record.kind for record in decision.record] == ["dependency"]
