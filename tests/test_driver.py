"""The driver: asks once, writes down what it is about to do, never sends twice, concludes nothing from silence."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import SLURM_LIKE, Clock, ScriptedCluster, TouchConfig, chain, driven, execute, finish, write_run

from aipo_hpc.clusters import Submission, TaskState
from aipo_hpc.clusters.inline import InlineCluster
from aipo_hpc.decision import GivenUp
from aipo_hpc.driver import Cancelled
from aipo_hpc.errors import ClusterError, RunFailed, SubmitRefused
from aipo_hpc.explain import explain
from aipo_hpc.graph import Graph
from aipo_hpc.journal import Journal
from aipo_hpc.lease import request_cancel
from aipo_hpc.living import LOST_AFTER
from aipo_hpc.sentinel import Failure
from aipo_hpc.store import Run

A, B, C = "iter-00/a", "iter-00/b", "iter-00/c"


def sent(cluster: ScriptedCluster) -> list[tuple[str, tuple[int, ...]]]:
    return [(submission.job, submission.shards) for submission in cluster.taken]


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.read_journal() if event["event"] == kind]


def work(run: Run, submission: Submission) -> None:
    for index in range(len(submission.shards)):
        execute(run, submission, index)


# -- looking ---------------------------------------------------------------------------------------------------------


def test_a_look_is_one_query_of_the_scheduler_however_much_is_submitted(run: Run, graph: Graph, clock: Clock) -> None:
    cluster = ScriptedCluster(replace(SLURM_LIKE, max_array_size=1))
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        assert (len(cluster.taken), cluster.num_queries) == (4, 0), "nothing to ask while nothing was sent"
        for number in range(1, 6):
            clock.sleep(1)
            at_work.driver.tick()
            assert cluster.num_queries == number
    print(f"{len(cluster.taken)} submissions, 5 looks, {cluster.num_queries} queries")


def test_queries_keep_their_distance_while_files_are_looked_at_each_time(run: Run, graph: Graph, clock: Clock) -> None:
    cluster = ScriptedCluster(replace(SLURM_LIKE, query_interval=20.0))
    with driven(run, graph, cluster) as at_work:
        for second in range(60):
            at_work.driver.tick()
            clock.sleep(1)
            if second == 30:
                work(run, cluster.taken[0])
        assert cluster.num_queries == 3
        decision, view = at_work.views[31]
        assert view.done[A] == {0, 1, 2, 3} and A not in decision.alive


def test_a_shard_that_finishes_while_the_scheduler_is_asked_is_seen_done(
    run: Run, graph: Graph, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ScriptedCluster(replace(SLURM_LIKE, settle=0.0))
    told = cluster.states

    def states_as_it_finishes(submissions: list[Submission]) -> Any:
        for submission in list(cluster.taken):
            if submission.job == A:
                work(run, submission)
        cluster.end(None)
        return told(submissions)

    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        clock.sleep(1)
        monkeypatch.setattr(cluster, "states", states_as_it_finishes)
        decision = at_work.driver.tick()
        assert decision.record == () and run.job(A).failures() == []
        assert [submit.job for submit in decision.submit] == [B]


def test_a_damaged_sentinel_is_told_once_and_its_shard_sent_again(run: Run, graph: Graph, clock: Clock) -> None:
    finish(run, graph, A, 1)
    (run.path / A / "done" / "00001.json").write_text("{")
    cluster = ScriptedCluster()
    with driven(Run(run.path), graph, cluster) as at_work:
        for _ in range(3):
            at_work.driver.tick()
            clock.sleep(1)
        assert sum("counts as not done" in line for line in at_work.lines) == 1
    assert (A, (0, 1, 2, 3)) in sent(cluster)
    assert len(events(run, "report")) == 1


# -- sending ---------------------------------------------------------------------------------------------------------


def test_the_intent_is_in_the_journal_before_the_cluster_is_asked_and_its_answer_after(run: Run, graph: Graph) -> None:
    seen: list[tuple[str, list[str]]] = []
    cluster = ScriptedCluster(
        after_submit=lambda submission: seen.append(
            (events(run, "submit")[-1]["name"], [event["name"] for event in events(run, "submitted")])
        )
    )
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
    (submission,) = cluster.taken
    assert seen == [(submission.name, [])]
    assert [(event["name"], event["id"]) for event in events(run, "submitted")] == [(submission.name, "1")]


def test_a_submission_whose_answer_was_lost_is_found_by_name_and_never_sent_twice(
    run: Run, graph: Graph, clock: Clock
) -> None:
    cluster = ScriptedCluster(answers=[ClusterError("Socket timed out on send/recv operation")], takes_although=True)
    with driven(run, graph, cluster) as at_work:
        for _ in range(200):
            decision = at_work.driver.tick()
            clock.sleep(1)
        assert decision.alive == {A: dict.fromkeys(range(4), False)}
    with driven(Run(run.path), graph, cluster) as another:
        for _ in range(200):
            another.driver.tick()
            clock.sleep(1)
        work(run, cluster.taken[0])
        another.driver.tick()
    assert sent(cluster) == [(A, (0, 1, 2, 3)), (B, (0, 1, 2, 3))]
    assert run.job(A).failures() == []


def test_a_submission_that_was_not_taken_is_sent_again_under_another_name_once_it_was_looked_for(
    run: Run, graph: Graph, clock: Clock
) -> None:
    cluster = ScriptedCluster(answers=[ClusterError("Socket timed out on send/recv operation")])
    began = clock.now
    with driven(run, graph, cluster) as at_work:
        while not cluster.taken:
            at_work.driver.tick()
            clock.sleep(1)
            assert clock.now < began + 600
        assert clock.now >= began + LOST_AFTER
        assert any("Socket timed out" in line for line in at_work.lines)
    names = [event["name"] for event in events(run, "submit")]
    assert len(set(names)) == 2 and cluster.taken[0].name == names[1]
    assert Counter(failure.kind for failure in run.job(A).failures()) == {"lost": 4}


def test_a_refused_submission_stops_the_driver_with_the_words_of_the_scheduler(run: Run, graph: Graph) -> None:
    cluster = ScriptedCluster(answers=[SubmitRefused("invalid partition specified: gpuu")])
    with driven(run, graph, cluster) as at_work, pytest.raises(SubmitRefused, match="gpuu"):
        at_work.driver.follow(0.0)
    assert [event["message"] for event in events(run, "refused")] == ["invalid partition specified: gpuu"]
    with driven(Run(run.path), graph, cluster) as another:
        another.driver.tick()
    assert sent(cluster) == [(A, (0, 1, 2, 3))], "the next launch sends it at once"


def test_what_still_runs_is_adopted_by_the_next_driver(run: Run, graph: Graph, clock: Clock) -> None:
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        clock.sleep(1)
        at_work.driver.tick()
    before = sent(cluster)
    for _ in range(3):
        with driven(Run(run.path), graph, cluster) as another:
            for _ in range(5):
                clock.sleep(60)
                another.driver.tick()
    assert sent(cluster) == before == [(A, (0, 1, 2, 3)), (B, (0, 1, 2, 3))]


# -- silence, and being replaced -------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True], ids=["the same driver", "a driver that starts in the outage"])
def test_an_outage_of_the_scheduler_is_waited_out_and_nothing_is_concluded(
    run: Run, graph: Graph, clock: Clock, restarted: bool
) -> None:
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        for _ in range(3):
            at_work.driver.tick()
            clock.sleep(1)
        before = sent(cluster)
        cluster.outage = ClusterError("Unable to contact slurm controller (connect failure)")

        def wait_an_hour(driver: Any) -> None:
            for _ in range(60):
                decision = driver.tick()
                assert not (decision.submit or decision.record or decision.stuck or decision.given_up)
                clock.sleep(60)

        if not restarted:
            wait_an_hour(at_work.driver)
            assert any("does not answer, waiting: Unable to contact" in line for line in at_work.lines)
    if restarted:
        with driven(Run(run.path), graph, cluster) as another:
            wait_an_hour(another.driver)
    assert sent(cluster) == before and cluster.cancelled == [] and run.job(A).failures() == []

    cluster.outage = None
    with driven(Run(run.path), graph, cluster) as another:
        work(run, cluster.taken[0])
        work(run, cluster.taken[1])
        decision = another.driver.tick()
    assert [submit.job for submit in decision.submit] == [C], "it goes on as if nothing had been"


def test_an_element_that_ended_in_the_outage_is_only_judged_after_it(run: Run, graph: Graph, clock: Clock) -> None:
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        clock.sleep(1)
        at_work.driver.tick()
        cluster.outage = ClusterError("no answer")
        cluster.forgets = {submission.name for submission in cluster.taken}
        for _ in range(10):
            clock.sleep(60)
            at_work.driver.tick()
        cluster.outage = None
        clock.sleep(1)
        assert at_work.driver.tick().record == (), "unknown for the first time"
        clock.sleep(LOST_AFTER)
        assert {record.kind for record in at_work.driver.tick().record} == {"lost"}


def another_takes_over(run: Run) -> None:
    owner = run.path / "driver.lease" / "owner.json"
    owner.write_text(json.dumps({**json.loads(owner.read_text()), "token": "another", "host": "elsewhere"}))


def test_a_driver_that_lost_its_lease_sends_nothing_and_stops(run: Run, graph: Graph) -> None:
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        another_takes_over(run)
        with pytest.raises(RunFailed, match="another driver has taken over"):
            at_work.driver.follow(0.0)
    assert cluster.taken == [] and events(run, "submit") == []
    assert (run.path / "driver.lease" / "owner.json").exists(), "the lease is the other's: it stays"


def test_a_driver_that_lost_its_lease_stops_also_with_nothing_to_send(run: Run, graph: Graph, clock: Clock) -> None:
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        for _ in range(3):
            at_work.driver.tick()
            clock.sleep(1)
        another_takes_over(run)
        cluster.end("killed")
        request_cancel(run)  # meant for the other one
        clock.sleep(3600)
        with pytest.raises(RunFailed, match="another driver has taken over"):
            at_work.driver.follow(1.0)
    assert run.job(A).failures() == [] and cluster.cancelled == []


def test_a_lease_lost_between_two_submissions_stops_the_second(run: Run, graph: Graph) -> None:
    cluster = ScriptedCluster(replace(SLURM_LIKE, max_array_size=2), after_submit=lambda _: another_takes_over(run))
    with driven(run, graph, cluster) as at_work, pytest.raises(RunFailed, match="another driver has taken over"):
        at_work.driver.tick()
    assert sent(cluster) == [(A, (0, 1))]


def test_a_lease_lost_between_the_intent_and_the_submission_stops_it(
    run: Run, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    intend = Journal.intend

    def intend_while_another_takes_over(journal: Journal, *given: Any, **named: Any) -> Submission:
        another_takes_over(run)
        return intend(journal, *given, **named)

    monkeypatch.setattr(Journal, "intend", intend_while_another_takes_over)
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work, pytest.raises(RunFailed, match="another driver has taken over"):
        at_work.driver.tick()
    assert cluster.taken == [] and len(events(run, "submit")) == 1
    assert Journal(run).submissions == {}, "an intent that came to nothing is not looked for"


# -- a full scheduler ------------------------------------------------------------------------------------------------


def test_a_full_scheduler_gets_smaller_arrays_and_the_rest_as_there_is_room(
    run: Run, graph: Graph, clock: Clock
) -> None:
    cluster = ScriptedCluster(replace(SLURM_LIKE, query_interval=20.0), room=2)
    with driven(run, graph, cluster) as at_work:
        while at_work.driver.tick().submit:
            pass
        assert sent(cluster) == [(A, (0, 1))] and not at_work.views[-1][0].stuck
        asked = len(events(run, "submit"))
        for _ in range(19):
            clock.sleep(1)
            at_work.driver.tick()
        assert len(events(run, "submit")) == asked, "a full scheduler is left alone for a while"
        work(run, cluster.taken[0])
        cluster.room = 100
        clock.on_sleep = lambda: [work(run, each) for each in cluster.taken]  # type: ignore[assignment,func-returns-value]
        at_work.driver.follow(5.0)
    assert sorted(shard for job, shards in sent(cluster) for shard in shards if job == A) == [0, 1, 2, 3]
    assert sum("has no room" in line for line in at_work.lines) == 1, "said once, not at each look"
    assert run.job(A).failures() == []


def test_a_scheduler_full_of_other_jobs_is_waited_for_with_nothing_of_ours_alive(
    run: Run, graph: Graph, clock: Clock
) -> None:
    cluster = ScriptedCluster(room=0)
    with driven(run, graph, cluster) as at_work:
        for _ in range(50):
            decision = at_work.driver.tick()
            assert not decision.stuck
            clock.sleep(1)
        cluster.room = 100
        at_work.driver.tick()
    assert sent(cluster), "sent as soon as there is room"


# -- cancel ----------------------------------------------------------------------------------------------------------


def test_asked_to_stop_the_driver_cancels_what_is_unfinished_and_the_run_can_go_on(
    run: Run, graph: Graph, clock: Clock
) -> None:
    cluster = ScriptedCluster(replace(SLURM_LIKE, max_array_size=2))
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        first, second = cluster.taken
        work(run, first)
        clock.on_sleep = lambda: request_cancel(run)
        with pytest.raises(Cancelled):
            at_work.driver.follow(1.0)
    assert first.name not in cluster.cancelled and second.name in cluster.cancelled
    assert events(run, "cancel")[-1]["submissions"] == cluster.cancelled

    clock.on_sleep = lambda: None
    cluster.end("cancelled", *cluster.cancelled)
    with driven(Run(run.path), graph, cluster) as another:
        for _ in range(40):
            another.driver.tick()
            clock.sleep(1)
    assert (A, (2, 3)) in sent(cluster)[-3:], "what was cancelled is sent again"
    assert sent(cluster).count((A, (0, 1))) == 1, "what was done is not"


# -- to the end ------------------------------------------------------------------------------------------------------


def test_a_run_is_followed_to_its_end_with_each_shard_once(tmp_path: Path) -> None:
    log = tmp_path / "executions"
    graph = chain(iterations=2, config=TouchConfig(executions=str(log)))
    run = write_run(tmp_path / "run", graph)
    with driven(run, graph, InlineCluster()) as at_work:
        at_work.driver.follow(0.0)
    executions = log.read_text().splitlines()
    assert len(executions) == len(set(executions)) == sum(job.num_shards for job in graph.jobs.values())
    assert [job for job, _ in Counter(line.split()[0] for line in executions).items()] == list(graph.jobs)
    with driven(Run(run.path), graph, InlineCluster()) as again:
        again.driver.follow(0.0)
    assert log.read_text().splitlines() == executions


def test_a_run_that_cannot_go_on_says_which_shard_why_and_what_to_type(tmp_path: Path) -> None:
    reason = tmp_path / "reason"
    reason.write_text("DataError prompts.jsonl: line 3 is no JSON")
    failing = TouchConfig(fail=str(reason))
    graph = chain(config=failing)
    run = write_run(tmp_path / "run", graph)
    with driven(run, graph, InlineCluster()) as at_work, pytest.raises(RunFailed) as failed:
        at_work.driver.follow(0.0)
    text = str(failed.value)
    for words in (
        f"{run.path}: cannot go on",
        "iter-00/a shard 0: user_error: DataError: prompts.jsonl: line 3 is no JSON",
        "what to do: mend what the message says",
        f"python -m aipo_hpc logs {run.path} iter-00/a 0",
        "type the same command again",
    ):
        assert words in text
    reason.unlink()
    with driven(Run(run.path), graph, InlineCluster()) as again:
        again.driver.follow(0.0)
    assert len(run.job(C).done(graph.fingerprints[C])) == 1, "mended and launched again, it finishes"


def test_an_explanation_names_logs_and_shortens_a_long_list(run: Run) -> None:
    given_up = tuple(
        GivenUp(A, shard, Failure(A, shard, "s-1", 1, "killed", "died", log=f"/logs/{shard}.out")) for shard in range(8)
    )
    text = explain(run, given_up)
    assert "log: /logs/0.out" in text and "... and 3 more shards" in text and "/logs/5.out" not in text


def test_an_element_that_died_without_a_word_is_recorded_with_the_words_of_the_scheduler_and_its_log(
    run: Run, graph: Graph, clock: Clock
) -> None:
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
        (submission,) = cluster.taken
        log = run.job(A).logs / "1_2_0_log.out"
        log.write_text("Killed\n")
        over = TaskState(alive=False, kind="out_of_memory", detail="Slurm: OUT_OF_MEMORY, exit code 0:125")
        cluster.told[submission.name] = {2: over}
        for _ in range(20):
            clock.sleep(1)
            at_work.driver.tick()
        (failure,) = run.job(A).failures()
        assert (failure.shard, failure.kind, failure.log) == (2, "out_of_memory", str(log))
        assert "exit code 0:125" in failure.message
        assert any("iter-00/a shard 2: out_of_memory" in line for line in at_work.lines)
    assert (A, (2,)) in sent(cluster)


def test_the_journal_knows_each_submission_again(run: Run, graph: Graph) -> None:
    cluster = ScriptedCluster()
    with driven(run, graph, cluster) as at_work:
        at_work.driver.tick()
    (again,) = Journal(Run(run.path)).submissions.values()
    assert (again.name, again.shards, again.id) == (cluster.taken[0].name, (0, 1, 2, 3), "1")
