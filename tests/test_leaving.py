"""Asked to leave before the end: stages stop where nothing is lost, training saves, and what is continued is the same."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import PROMPTS_PER_CALL, unfinished
from sandbox import Sandbox
from test_slurm_run import command, driver, output_hashes, wait_until
from tiny_models import tiny_model_folder
from training_tasks import LEFT, PLAIN, identical, launch, logs, metrics, scored_rows, train_task

from aipo_hpc import leaving
from aipo_hpc.clusters.envelope import SubmititEnvelope, notice
from aipo_hpc.journal import Journal
from aipo_hpc.progress import Progress
from aipo_hpc.record import read_graph
from aipo_hpc.resources import Resources
from aipo_hpc.store import Run
from aipo_hpc.worker import Envelope


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "_asked", leaving.NOT_ASKED)
    monkeypatch.setattr(leaving, "_ending", False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_asked_to_stop_a_stage_stops_and_asked_to_save_it_goes_on() -> None:
    leaving.here("nowhere")
    leaving.ask(leaving.SAVE)
    leaving.here("nowhere")
    leaving.saved()
    assert leaving.asked() == leaving.NOT_ASKED and leaving.ending()
    leaving.ask(leaving.STOP)
    leaving.saved()
    with pytest.raises(leaving.Left, match="iter-00/rank: asked to leave"):
        leaving.here("iter-00/rank")


@pytest.mark.parametrize(("minutes", "seconds"), [(1, 15), (4, 60), (8, 120), (720, 120)])
def test_the_notice_is_a_quarter_of_the_time_and_two_minutes_at_most(minutes: int, seconds: int) -> None:
    assert notice(Resources(time=minutes)) == seconds


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stage", ["generate", "rank", "reference"])
def test_a_stage_that_leaves_is_continued_and_gives_the_same_bytes(
    tmp_path: Path, finished_run: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aipo_hpc.rankers.pairrm.PairRM.prompts_per_call", PROMPTS_PER_CALL)
    job = f"iter-00/{stage}"
    whole, (before,) = unfinished(finished_run, tmp_path / "run", (job, 0))
    graph = read_graph(whole)
    envelope = Envelope(str(whole.path), job, 0, "again", 0, 1)

    append = Progress.append

    def append_and_be_asked(self: Any, row: Any) -> None:
        append(self, row)
        leaving.ask(leaving.STOP)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "append", append_and_be_asked)
        with pytest.raises(leaving.Left):
            envelope.run()
    rows = (whole.path / job / "shards/00000/again.0.r0/progress.jsonl").read_text().splitlines()
    assert 0 < len(rows) < before.rows, "it stopped neither at once nor at the end"
    assert whole.job(job).failures() == [], "leaving is no failure"
    monkeypatch.setattr(leaving, "_asked", leaving.NOT_ASKED)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    envelope.run()
    after = whole.job(job).done(graph.fingerprints[job])[0]
    assert after.attempt == "again.0.r1" and after.outputs == before.outputs
    print(f"{stage}: left with {len(rows)} of {before.rows} rows; the continued shard has the same bytes")


def test_signals_ask_and_submitits_handler_is_called_where_the_stage_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGALRM, signal.SIGTERM)}

    def work(self: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert leaving.asked() == leaving.SAVE
        os.kill(os.getpid(), signal.SIGUSR2)
        leaving.here("work")

    def stuck(self: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        deadline = time.monotonic() + 20
        while not called:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    try:
        for what in (work, stuck):
            called.clear()
            signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
            monkeypatch.setattr(Envelope, "run", what)
            SubmititEnvelope(str(tmp_path), "job", 0, "s-1", 0, 1, notice=1)()
            assert called == [signal.SIGUSR2]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_training_asked_to_leave_saves_on_all_processes_and_is_continued_with_the_same_losses_and_weights(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, zero_stage: int
) -> None:
    model = tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")
    rows = scored_rows(tmp_path / "reference", 20, model)
    processes = 2 if zero_stage else 1
    config = {**PLAIN, "zero_stage": zero_stage, "num_train_epochs": 2.0, "save_steps": 100}
    whole = train_task(tmp_path / "whole", rows, model)
    assert launch(whole, num_processes=processes, **config) == [0] * processes, logs(whole)
    first = train_task(tmp_path / "first", rows, model)
    exits = launch(first, num_processes=processes, die="asked after step 2", **config)
    assert exits == [LEFT] * processes, logs(first)
    (checkpoint,) = (first.out / "checkpoints").iterdir()
    assert (checkpoint / "complete.json").exists() and (first.out / "advanced").exists()
    second = train_task(tmp_path / "second", rows, model, earlier=(first.out,))
    assert launch(second, num_processes=processes, **config) == [0] * processes, logs(second)
    assert f"'resumed_from_step': {checkpoint.name.partition('-')[2]}" in logs(second)
    assert metrics(whole.out) == metrics(second.out)
    assert identical(whole.out / "model", second.out / "model")


def attempts(run: Run) -> list[Path]:
    """Folders of the attempts at training."""
    return list((run.path / "iter-00/train/shards/00000").glob("*"))


def steps(run: Run) -> int:
    """Logged steps of training, of all attempts."""
    found = [path / "metrics.jsonl" for path in attempts(run)]
    return sum(len(path.read_text().splitlines()) for path in found if path.exists())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_slurm_two_nodes_save_on_the_signal_are_requeued_and_train_on_to_the_same_model(
    slurm_sandbox: Sandbox, tmp_path: Path
) -> None:
    environment = {**os.environ, **slurm_sandbox.env, "OMP_NUM_THREADS": "1"}
    fields = (
        "train.resources.nodes=2",
        "train.zero_stage=2",
        "train.num_train_epochs=30",
        "train.save_steps=1000",
        "generate.num_shards=2",
    )
    hashes = {}
    for name, disturbed in (("quiet", False), ("disturbed", True)):
        run = Run(tmp_path / name)
        with driver(command(run.path, *fields), environment) as driving:
            if disturbed:
                wait_until("some steps of training", lambda run=run: steps(run) > 5, 400)
                (job,) = (each.id for each in Journal(run).submissions.values() if each.job == "iter-00/train")
                assert job is not None
                slurm_sandbox.run("scancel", "--signal=USR2", job)
                wait_until("a second attempt", lambda run=run: len(attempts(run)) == 2, 120)
            assert driving.wait(timeout=500) == 0
        assert run.job("iter-00/train").failures() == []
        hashes[name] = output_hashes(run, "iter-00/train")
        (sentinel,) = run.job("iter-00/train").done(read_graph(run).fingerprints["iter-00/train"]).values()
        print(f"{name}: attempt {sentinel.attempt}, resumed from step {sentinel.counts['resumed_from_step']:g}")
        assert (sentinel.counts["resumed_from_step"] > 0) == disturbed
    assert hashes["quiet"] == hashes["disturbed"]
