"""The policy after failures: tables of recorded failures, and what is tolerated, waited for, changed and kept off."""

from dataclasses import replace

import pytest

from aipo_hpc.adjustment import AS_ASKED, Adjustment
from aipo_hpc.errors import ClusterError, DataError, DiskFull, InputNotVisible
from aipo_hpc.failures import (
    FAST,
    KINDS,
    LONGEST_BACKOFF,
    backoff,
    bad_nodes,
    classify,
    deaths,
    standings,
)
from aipo_hpc.fine_tuning import gradient_accumulation_steps
from aipo_hpc.sentinel import Failure
from aipo_hpc.settings import content, with_smaller_batches
from aipo_hpc.stages.generate import GenerateConfig
from aipo_hpc.stages.rank import RankConfig
from aipo_hpc.stages.reference import ReferenceConfig
from aipo_hpc.stages.train import TrainConfig


def failed(kind: str, number: int = 0, shard: int = 0, **fields: object) -> Failure:
    made = Failure("job", shard, f"s-{shard}.{number}.r0", 1, kind, "as the test says", time=100.0 + number)
    return replace(made, **fields)  # type: ignore[arg-type]


def several(kind: str, count: int, **fields: object) -> list[Failure]:
    return [failed(kind, number, **fields) for number in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_budget_of_its_own(kind: str) -> None:
    tolerated = KINDS[kind].tolerated
    assert not standings(several(kind, tolerated), 1).get(0, standings([failed("preempted")], 1)[0]).given_up
    assert standings(several(kind, tolerated + 1), 1)[0].given_up


def test_budgets_are_not_added_up() -> None:
    failures = [failed(kind, number) for number, kind in enumerate(["error", "killed", "timeout", "lost"] * 2)]
    assert not standings(failures, 1)[0].given_up


@pytest.mark.parametrize("kind", ["killed", "timeout", "out_of_memory", "error"])
def test_an_attempt_that_got_further_costs_nothing_and_clears_what_came_before(kind: str) -> None:
    tolerated = KINDS[kind].tolerated
    assert not standings(several(kind, 50, progressed=True), 1)[0].given_up
    mixed = [*several(kind, tolerated), failed(kind, 50, progressed=True)]
    mixed += [failed(kind, 60 + number) for number in range(tolerated)]
    assert not standings(mixed, 1)[0].given_up
    assert standings([*mixed, failed(kind, 90)], 1)[0].given_up


def test_what_only_the_user_can_mend_ends_the_shard_however_far_it_got() -> None:
    for kind in ("user_error", "disk_full"):
        assert standings([failed(kind, progressed=True)], 1)[0].given_up


def test_failures_of_earlier_launches_and_repeated_records_do_not_count() -> None:
    assert standings([failed("user_error")], 2) == {}
    assert not standings([failed("error")] * 9, 1)[0].given_up


def test_the_wait_doubles_up_to_a_bound_and_preemption_waits_for_nothing() -> None:
    assert [backoff("error", count) for count in range(4)] == [0, 2, 4, 8]
    assert backoff("error", 99) == LONGEST_BACKOFF
    assert backoff("preempted", 50) == backoff("timeout", 3) == 0
    assert standings(several("error", 2), 1)[0].retry_at == 101 + 4
    assert standings([failed("error", progressed=True)], 1)[0].retry_at == 100


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([failed("error"), failed("killed", 1), failed("preempted", 2)], AS_ASKED),
        ([failed("out_of_memory")], Adjustment(memory=1.5, batch=2)),
        (several("out_of_memory", 2), Adjustment(memory=2.25, batch=4)),
        (several("out_of_memory", 5, progressed=True), Adjustment(memory=2.25, batch=4)),
        ([failed("timeout")], Adjustment(time=2)),
        (several("timeout", 3), Adjustment(time=4)),
        ([failed("timeout", progressed=True)], AS_ASKED),
        ([failed("timeout"), failed("out_of_memory", 1)], Adjustment(memory=1.5, time=2, batch=2)),
        ([failed("input_not_visible", node="n2"), failed("error", 1, node="n3")], Adjustment(exclude=("n2",))),
        ([failed("input_not_visible", node="n[1-2]")], AS_ASKED),
    ],
)
def test_what_is_asked_for_when_a_shard_is_tried_again(failures: list[Failure], expected: Adjustment) -> None:
    assert standings(failures, 1)[0].adjustment == expected


def test_an_adjustment_says_what_it_is() -> None:
    assert str(Adjustment(1.5, 2, 4, ("n1", "n2"))) == "1.5 x the memory, 2 x the time, 1/4 of the batch, not on n1, n2"
    assert str(AS_ASKED) == ""


def test_a_node_that_failed_twice_is_kept_off_and_one_event_counts_once() -> None:
    once = {"a": [failed("node_failure", shard=shard, node="n1", time=50.0 + shard) for shard in range(8)]}
    assert bad_nodes(once, {}, 1) == {}
    twice = {**once, "b": [failed("node_failure", node="n1", time=500.0)]}
    assert bad_nodes(twice, {}, 1) == {"n1": "it failed 2 times"}
    assert bad_nodes(twice, {}, 2) == {}, "failures of an earlier launch speak against no node"


def fast(node: str, *shards: int, kind: str = "error", seconds: float | None = 3.0) -> list[Failure]:
    return [failed(kind, shard=shard, node=node, seconds=seconds) for shard in shards]


@pytest.mark.parametrize(
    ("failures", "good", "bad"),
    [
        (fast("n1", 0, 1, 2), {"n2"}, {"n1"}),
        (fast("n1", 0, 1, 2, kind="user_error"), {"n2"}, {"n1"}),
        (fast("n1", 0, 1), {"n2"}, set()),
        (fast("n1", 0, 0, 0), {"n2"}, set()),
        (fast("n1", 0, 1, 2), {"n1"}, set()),
        (fast("n1", 0, 1, 2), set(), set()),
        (fast("n1", 0, 1, 2) + fast("n2", 3), {"n3"}, set()),
        (fast("n1", 0, 1, 2, seconds=FAST + 1), {"n2"}, set()),
        (fast("n1", 0, 1, 2, seconds=None), {"n2"}, set()),
        (fast("n1", 0, 1, 2, kind="timeout"), {"n2"}, set()),
        (fast("", 0, 1, 2), {"n2"}, set()),
    ],
)
def test_a_node_on_which_shards_fail_at_once_while_others_do_well_elsewhere_is_kept_off(
    failures: list[Failure], good: set[str], bad: set[str]
) -> None:
    assert bad_nodes({"job": failures}, {"job": good}, 1).keys() == bad


def test_what_a_bad_node_did_is_not_held_against_the_shards() -> None:
    failures = [failed("user_error", node="n1"), failed("node_failure", 1, node="n1")]
    assert standings(failures, 1)[0].given_up
    assert standings(failures, 1, {"n1"})[0].counts == {"node_failure": 1}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("x"), "user_error"),
        (DiskFull("x"), "disk_full"),
        (OSError(28, "No space left on device"), "disk_full"),
        (InputNotVisible("x"), "input_not_visible"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), "out_of_memory"),
        (OSError(12, "Cannot allocate memory"), "out_of_memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "killed"),
        (RuntimeError("[../third_party/gloo] Connection closed by peer [127.0.0.1]:2345"), "killed"),
        (RuntimeError("NCCL error: remote process exited\nncclRemoteError: A call failed possibly due to"), "killed"),
        (type("EngineDeadError", (Exception,), {})("see the trace above"), "killed"),
        (ClusterError("x"), "error"),
        (ValueError("x"), "error"),
    ],
)
def test_exceptions_are_classed(error: BaseException, kind: str) -> None:
    assert classify(error) == kind and kind in KINDS


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("DataLoader worker (pid 7) is killed by signal: Killed"), "out_of_memory"),
        (type("EngineDeadError", (Exception,), {})("see the trace above"), "out_of_memory"),
        (DataError("x"), "user_error"),
        (DiskFull("x"), "disk_full"),
    ],
)
def test_where_the_kernel_killed_another_process_for_memory_that_is_why_unless_the_error_knows_better(
    error: BaseException, kind: str
) -> None:
    assert classify(error, starved=True) == kind


def test_the_attempts_that_died_are_known_though_the_scheduler_names_only_the_element() -> None:
    attempts = ["s-1.0.r0", "s-1.0.r2", "s-1.0.r10", "s-2.0.r0", "s-3.0.r0", "s-4.0.r0"]
    recorded = [
        failed("killed", attempt="s-1.0.driver"),
        failed("out_of_memory", attempt="s-2.0.r0"),
        failed("preempted", attempt="s-3.0.driver"),
        failed("timeout", attempt="s-4.0.driver", progressed=True),
        failed("killed", attempt="s-4.0.driver", shard=7),
    ]
    assert deaths(recorded, 0, attempts) == {"s-1.0.r10", "s-2.0.r0"}
    hung = [failed("timeout", attempt="s-3.0.driver")]
    assert deaths(hung, 0, attempts) == {"s-3.0.r0"}


def test_smaller_batches_are_tuning_and_leave_the_content_alone() -> None:
    for config in (GenerateConfig(), RankConfig(), ReferenceConfig(), TrainConfig()):
        smaller = with_smaller_batches(config, 4)
        assert smaller != config and content(smaller) == content(config)
        assert with_smaller_batches(config, 1) == config
    assert with_smaller_batches(GenerateConfig(batch_size=16), 2).batch_size == 16
    assert with_smaller_batches(GenerateConfig(), 2).max_num_seqs == 128
    assert with_smaller_batches(RankConfig(), 2).tokens_per_batch == 1024
    assert with_smaller_batches(RankConfig(tokens_per_batch=4096), 2).tokens_per_batch == 2048
    assert with_smaller_batches(TrainConfig(per_device_train_batch_size=1), 4).per_device_train_batch_size == 1


@pytest.mark.parametrize(
    ("size", "divisor", "lower"), [(8, 2, 4), (8, 4, 2), (6, 4, 1), (6, 2, 3), (5, 2, 1), (9, 2, 3)]
)
def test_a_smaller_batch_of_training_still_divides_the_global_batch(size: int, divisor: int, lower: int) -> None:
    config = TrainConfig(global_batch_size=size * 12, per_device_train_batch_size=size)
    smaller = with_smaller_batches(config, divisor)
    assert smaller.per_device_train_batch_size == lower
    assert gradient_accumulation_steps(smaller, 4) * lower == gradient_accumulation_steps(config, 4) * size
