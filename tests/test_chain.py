"""A run driven by a chain of small jobs: one successor at a time, none lost, none too many; proven on a real Slurm."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from fakes import (
    SLURM_LIKE,
    Clock,
    Driven,
    ScriptedCluster,
    TouchConfig,
    chain,
    child_environment,
    driven,
    eventually,
    execute,
    write_run,
)
from sandbox import Sandbox

from aipo_hpc import chain as chains
from aipo_hpc.__main__ import main
from aipo_hpc.chain import LOOK_AGAIN, Chain, dependencies
from aipo_hpc.clusters.steps import LivingStep
from aipo_hpc.errors import ClusterError, NoRoom, RecipeError, RunFailed, SubmitRefused
from aipo_hpc.graph import Graph
from aipo_hpc.journal import Journal
from aipo_hpc.launch import step
from aipo_hpc.recipe import Recipe, validate
from aipo_hpc.record import read_graph
from aipo_hpc.store import Run

A, B, C = "iter-00/a", "iter-00/b", "iter-00/c"


@dataclass
class FakeSteps:
    """Successors that are only noted; ``answers`` are raised instead of taking one."""

    waiting: list[LivingStep] = field(default_factory=list)
    sent: list[tuple[str, ...]] = field(default_factory=list)
    answers: list[Exception] = field(default_factory=list)
    takes_although: bool = False

    def living(self, but: str | None = None) -> Sequence[LivingStep]:
        return [each for each in self.waiting if each.id != but]

    def send(self, run: Run, after: Sequence[str], delay: float) -> str:
        answer = self.answers.pop(0) if self.answers else None
        if answer is None or self.takes_although:
            self.sent.append(tuple(after))
            self.waiting.append(LivingStep(f"{100 + len(self.sent)}", "PENDING", "PENDING, Dependency"))
        if answer is not None:
            raise answer
        return self.waiting[-1].id


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(time.time()).install(monkeypatch)
    monkeypatch.setattr(chains, "time", clock)
    return clock


def advance(run: Run, at_work: Driven, steps: FakeSteps, own_id: str | None = None) -> bool:
    recipe = Recipe(poll_seconds=1.0)
    return Chain(run, recipe, steps, at_work.driver, at_work.journal, at_work.lines.append, own_id).advance()


# -- what a successor waits for --------------------------------------------------------------------------------------


def test_a_successor_waits_for_the_end_of_anything_outstanding_and_not_for_ever() -> None:
    assert dependencies(["5", "7"], own_id="9") == ["afterany:5", "afterany:7", f"after:9+{LOOK_AGAIN}"]
    assert dependencies(["5"], own_id=None) == ["afterany:5", f"after:5+{LOOK_AGAIN}"]


def test_a_successor_comes_in_time_for_a_retry_that_is_due() -> None:
    assert dependencies(["5"], own_id="9", wait=61.0) == ["afterany:5", "after:9+2"]
    assert dependencies(["5"], own_id="9", wait=9000.0) == ["afterany:5", f"after:9+{LOOK_AGAIN}"]


def test_with_nothing_outstanding_a_successor_just_comes() -> None:
    assert dependencies([], own_id="9") == []


def test_a_successor_watches_no_more_submissions_than_fit_on_a_command_line() -> None:
    assert len(dependencies([str(number) for number in range(5000)], own_id="9")) == 21


def test_a_chain_needs_slurm() -> None:
    recipe = Recipe(model_name_or_path="x", prompts="y", drive="chain", cluster="local")
    with pytest.raises(RecipeError, match=r"drive=chain needs cluster=slurm"):
        validate(replace(recipe, rank=replace(recipe.rank, model_name_or_path="z")))


# -- one successor ---------------------------------------------------------------------------------------------------


def test_a_step_sends_what_can_be_sent_and_passes_on_to_one_successor(run: Run, graph: Graph, clock: Clock) -> None:
    cluster, steps = ScriptedCluster(), FakeSteps()
    began = clock.now
    with driven(run, graph, cluster) as at_work:
        assert not advance(run, at_work, steps)
    assert [submission.job for submission in cluster.taken] == [A, B]
    assert steps.sent == [("afterany:1", "afterany:2", f"after:1+{LOOK_AGAIN}", f"after:2+{LOOK_AGAIN}")]
    assert clock.now == began, "it waited for nothing"


def test_the_launch_typed_again_while_a_step_waits_adopts_it(run: Run, graph: Graph, clock: Clock) -> None:
    cluster, steps = ScriptedCluster(), FakeSteps()
    for _ in range(2):
        with driven(run, graph, cluster) as at_work:
            assert not advance(run, at_work, steps)
    assert len(steps.sent) == 1
    assert "the next step is job 101 (PENDING, Dependency)" in at_work.lines


def test_a_step_does_not_take_itself_for_its_successor(run: Run, graph: Graph, clock: Clock) -> None:
    steps = FakeSteps([LivingStep("9", "RUNNING", "RUNNING")])
    with driven(run, graph, ScriptedCluster()) as at_work:
        assert not advance(run, at_work, steps, own_id="9")
    assert steps.sent == [("afterany:1", "afterany:2", f"after:9+{LOOK_AGAIN}")]


def test_a_successor_whose_answer_was_lost_is_found_and_not_sent_twice(run: Run, graph: Graph, clock: Clock) -> None:
    steps = FakeSteps(answers=[ClusterError("no answer within 120 s")], takes_although=True)
    with driven(run, graph, ScriptedCluster()) as at_work:
        assert not advance(run, at_work, steps)
    assert len(steps.sent) == len(steps.waiting) == 1


def test_without_room_for_a_successor_the_step_stays_and_drives(run: Run, graph: Graph, clock: Clock) -> None:
    cluster, steps = ScriptedCluster(), FakeSteps(answers=[NoRoom("AssocMaxSubmitJobLimit")] * 3)
    clock.on_sleep = lambda: [execute(run, cluster.taken[0], index) for index in range(4)].clear()
    with driven(run, graph, cluster) as at_work:
        assert not advance(run, at_work, steps)
    assert len(steps.sent) == 1 and run.job(A).done(graph.fingerprints[A]).keys() == {0, 1, 2, 3}


def test_a_step_knows_what_the_scheduler_had_no_room_for_in_those_before_it(tmp_path: Path, clock: Clock) -> None:
    graph = chain(64)
    run = write_run(tmp_path / "run", graph)
    cluster, steps = ScriptedCluster(replace(SLURM_LIKE, query_interval=20.0), room=5), FakeSteps()
    refused = []
    for number in range(4):
        with driven(run, graph, cluster, step=number > 0) as at_work:
            at_work.driver.tick()
            advance(run, at_work, steps)
        refused.append(sum(event["event"] == "refused" for event in run.read_journal()) - sum(refused))
        steps.waiting.clear()
        clock.sleep(60)
    sizes = [len(each.shards) for each in cluster.taken]
    print(f"64 shards, room for five: refused in each of four steps {refused}, taken {sizes}")
    assert refused == [5, 3, 1, 1], "the second step fills the room, the others find it full"
    assert sum(sizes) == 5


def test_a_refused_successor_is_an_error_of_the_step(run: Run, graph: Graph, clock: Clock) -> None:
    steps = FakeSteps(answers=[SubmitRefused("Invalid partition")])
    with driven(run, graph, ScriptedCluster()) as at_work, pytest.raises(SubmitRefused):
        advance(run, at_work, steps)


def test_a_finished_run_has_no_successor(run: Run, graph: Graph, clock: Clock) -> None:
    cluster, steps = ScriptedCluster(), FakeSteps()
    finished = False
    for _ in range(5):
        steps.waiting.clear()
        with driven(run, graph, cluster) as at_work:
            finished = advance(run, at_work, steps)
        if finished:
            break
        for submission in cluster.taken:
            for index in range(len(submission.shards)):
                execute(run, submission, index)
        cluster.end(None)
    assert finished and steps.waiting == []


def test_a_run_that_cannot_go_on_has_no_successor_and_says_why(tmp_path: Path, clock: Clock) -> None:
    fails = tmp_path / "fails"
    fails.write_text("DataError no such thing")
    graph = chain(1, TouchConfig(fail=str(fails)))
    run = write_run(tmp_path / "run", graph)
    cluster, steps = ScriptedCluster(replace(SLURM_LIKE, dependencies=False)), FakeSteps()

    def run_all(submission: object) -> None:
        with pytest.raises(Exception, match="no such thing"):
            execute(run, cluster.taken[-1], 0)
        cluster.end("killed")
        clock.sleep(1)

    cluster.after_submit = run_all
    with driven(run, graph, cluster) as at_work, pytest.raises(RunFailed, match="no such thing"):
        advance(run, at_work, steps)
    assert steps.sent == []


def test_a_step_stays_while_an_element_that_ended_may_yet_show_its_files(run: Run, graph: Graph, clock: Clock) -> None:
    cluster, steps = ScriptedCluster(replace(SLURM_LIKE, dependencies=False, settle=15.0)), FakeSteps()
    with driven(run, graph, cluster) as at_work:
        advance(run, at_work, steps)
    cluster.end("killed")
    steps.waiting.clear()
    clock.sleep(60)
    began = clock.now
    with driven(run, graph, cluster) as at_work:
        assert not advance(run, at_work, steps)
    assert clock.now - began >= 15.0, "judged by this step: the next would begin to wait anew"
    assert {failure.kind for failure in run.job(A).failures()} == {"killed"}


def test_a_step_stays_while_the_scheduler_does_not_answer(run: Run, graph: Graph, clock: Clock) -> None:
    cluster, steps = ScriptedCluster(outage=None), FakeSteps()
    with driven(run, graph, cluster) as at_work:
        advance(run, at_work, steps)
    steps.waiting.clear()
    clock.sleep(60)
    cluster.outage = ClusterError("unable to contact slurm controller")

    def comes_back() -> None:
        if clock.now > began + 300:
            cluster.outage = None

    clock.on_sleep = comes_back
    began = clock.now
    with driven(run, graph, cluster) as at_work:
        assert not advance(run, at_work, steps)
    assert clock.now >= began + 300 and cluster.cancelled == []
    assert run.job(A).failures() == []


def test_steps_forgive_no_failures_and_each_has_a_higher_fence(run: Run) -> None:
    journal = Journal(run)
    first = journal.launch()
    assert journal.step() == first + 1
    again = Journal(run)
    assert (again.fence, again.launched) == (first + 1, first)
    assert again.launch() == first + 2
    assert Journal(run).launched == first + 2


def test_a_step_of_a_run_that_is_no_longer_driven_by_a_chain_ends_it(
    run: Run, graph: Graph, capfd: pytest.CaptureFixture[str]
) -> None:
    written = run.read_recipe()
    run.write_recipe({**written, "settings": {**written["settings"], "drive": "follow"}})
    step(run.path, "9")
    assert "is not driven by a chain any more" in capfd.readouterr().err
    assert Journal(run).fence == 0


# -- on a real Slurm -------------------------------------------------------------------------------------------------


@pytest.fixture
def on_slurm(slurm_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """This process, and what it submits, are users of the sandbox who know the stage ``touch``."""
    for name, value in {**slurm_sandbox.env, **child_environment(tmp_path / "site")}.items():
        monkeypatch.setenv(name, value)
    return slurm_sandbox


def chained(path: Path, graph: Graph, **settings: object) -> Run:
    """A run directory as a launch with drive=chain leaves it."""
    run = write_run(path, graph)
    slurm = {"query_seconds": 1.0, "step_seconds": 2.0, "driver": {"time": 2}, **settings}
    fields = {"name": "fake", "cluster": "slurm", "drive": "chain", "poll_seconds": 0.3, "slurm": slurm}
    run.write_recipe({"run_id": f"c{os.urandom(3).hex()}", "recipe": "fake", "settings": fields})
    Journal(run).launch()
    return run


def living_steps(sandbox: Sandbox, run: Run) -> list[str]:
    name = f"aipo-{run.read_recipe()['run_id']}-step"
    return sandbox.run("squeue", "--noheader", f"--name={name}", "--states=PENDING,RUNNING", "--format=%A").split()


def finished(run: Run) -> bool:
    graph = read_graph(run)
    return all(len(run.job(name).done(graph.fingerprints[name])) == job.num_shards for name, job in graph.jobs.items())


@contextmanager
def chain_in_view(run: Run) -> Iterator[None]:
    """Shows what the steps said if the test fails."""
    try:
        yield
    except BaseException:
        for log in sorted(run.chain.glob("*_log.out")):
            print(f"== {log.name}\n{log.read_text()}")
        raise


def test_a_run_finishes_by_steps_alone_and_never_has_two_of_them(
    on_slurm: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold, executions = tmp_path / "hold", tmp_path / "executions"
    hold.touch()
    graph = chain(3, TouchConfig(hold=str(hold), executions=str(executions)), iterations=2)
    run = chained(tmp_path / "run", graph)
    with chain_in_view(run):
        step(run.path, None)
        (waiting,) = living_steps(on_slurm, run)
        step(run.path, None)
        assert living_steps(on_slurm, run) == [waiting], "typed again: adopted"
        assert main(["status", str(run.path)]) == 0
        assert f"driven by a chain; its next step is job {waiting} (PENDING, " in capsys.readouterr().out

        on_slurm.run("scancel", waiting)
        assert eventually(lambda: not living_steps(on_slurm, run))
        step(run.path, None)
        assert len(living_steps(on_slurm, run)) == 1, "a step that was killed is replaced"

        hold.unlink()
        most = 0
        deadline = time.monotonic() + 240
        while not finished(run) and time.monotonic() < deadline:
            most = max(most, len(living_steps(on_slurm, run)))
            time.sleep(0.2)
        assert finished(run), "the chain broke"
        assert eventually(lambda: not living_steps(on_slurm, run), 30), "a finished run keeps a step"
    ran = executions.read_text().splitlines()
    assert sorted(ran) == sorted(set(ran)) and len(ran) == 14
    logs = "".join(log.read_text() for log in run.chain.glob("*_log.out"))
    sent = re.findall(r"the next step is job (\d+), after", logs)
    print(
        f"14 shards, {len(sent)} steps sent by steps, at most {most} living at a time (one ends while the next waits)"
    )
    assert most <= 2 and len(sent) == len(set(sent))
    assert Journal(run).launched == 1


def test_cancel_takes_the_waiting_step_along_and_leaves_a_run_that_resumes(on_slurm: Sandbox, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    run = chained(tmp_path / "run", chain(2, TouchConfig(hold=str(hold))))
    with chain_in_view(run):
        step(run.path, None)
        assert living_steps(on_slurm, run)
        assert main(["cancel", str(run.path)]) == 0
        name = f"aipo-{run.read_recipe()['run_id']}"
        assert eventually(lambda: name not in on_slurm.run("squeue", "--noheader", "--format=%j")), "something is left"
        hold.unlink()
        step(run.path, None)
        assert eventually(lambda: finished(run), 120)


def test_a_failed_element_is_sent_again_by_a_later_step(on_slurm: Sandbox, tmp_path: Path) -> None:
    fails = tmp_path / "fails"
    fails.write_text("RuntimeError for now")
    run = chained(tmp_path / "run", chain(1, TouchConfig(fail=str(fails))))
    with chain_in_view(run):
        step(run.path, None)
        assert eventually(lambda: run.job(A).failures(), 60)
        fails.unlink()
        assert eventually(lambda: finished(run), 180)


@pytest.mark.slow
def test_a_step_that_outlives_its_walltime_is_requeued_and_goes_on(on_slurm: Sandbox, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    graph = chain(1, TouchConfig(hold=str(hold)))
    run = chained(tmp_path / "run", graph, driver={"time": 1})
    with chain_in_view(run):
        step(run.path, None)
        (waiting,) = living_steps(on_slurm, run)
        # Somebody on another node drives, by all signs of life: the step waits for the lease beyond its minute.
        lease = run.path / "driver.lease"
        lease.mkdir()
        owner = {"token": "x", "host": "elsewhere", "pid": 1, "started": "1", "boot_id": "", "heartbeat": time.time()}
        (lease / "owner.json").write_text(json.dumps(owner))
        hold.unlink()

        def requeued() -> bool:
            owner["heartbeat"] = time.time()
            (lease / "owner.json.new").write_text(json.dumps(owner))
            (lease / "owner.json.new").rename(lease / "owner.json")
            return "Restarts=1" in on_slurm.run("scontrol", "show", "job", waiting)

        assert eventually(requeued, 150)
        (lease / "owner.json").unlink()
        lease.rmdir()
        assert eventually(lambda: finished(run), 240)
    print(f"step {waiting} was signalled before its minute was over, requeued, and went on")


@pytest.mark.slow
def test_the_driver_script_in_a_partition_of_five_minutes_finishes_a_run_that_its_walltime_would_not_hold(
    slurm_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    script = Path(__file__).resolve().parents[1] / "sbatch" / "driver.sbatch"
    fields = [
        "recipe=demo", "cluster=slurm", "iterations=1", "data.limit=24", "data.num_held_out=6", "generate.n=3",
        "generate.max_tokens=12", "train.num_train_epochs=1", "train.global_batch_size=8",
        "train.per_device_train_batch_size=4", "slurm.query_seconds=3", "poll_seconds=0.3", "slurm.step_seconds=3",
        "slurm.driver.time=1", "slurm.driver.partition=short", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    began = time.monotonic()
    options = ["--partition=short", "--time=1", "--parsable", "--export=ALL,OMP_NUM_THREADS=1"]
    driver = slurm_sandbox.run("sbatch", *options, str(script), *fields, cwd=tmp_path)
    run = Run(tmp_path / "run")
    with chain_in_view(run):
        assert eventually(lambda: run.exists() and (run.path / "iter-00/evaluate/done/00000.json").exists(), 600)
        took = time.monotonic() - began
        assert eventually(lambda: not living_steps(slurm_sandbox, run), 60)
        assert finished(run)
    states = slurm_sandbox.run("sacct", "-X", "-n", "-P", f"--jobs={driver}", "--format=State,Elapsed")
    print(f"finished after {took:.0f} s; the driver's own job: {states}; each step had one minute")
    assert took > 60 and states.startswith("COMPLETED")


def test_the_steps_keep_no_process_on_this_machine(on_slurm: Sandbox, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    run = chained(tmp_path / "run", chain(1, TouchConfig(hold=str(hold))))
    code = f"from pathlib import Path; from aipo_hpc.launch import step; step(Path({str(run.path)!r}), None)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert not (run.path / "driver.lease").exists()
    assert main(["cancel", str(run.path)]) == 0
