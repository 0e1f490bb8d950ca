"""A worker: it checks its inputs itself, works once, publishes last, and tells what went wrong."""

import errno
import os
import time
from pathlib import Path

import pytest
from fakes import OUT, TouchConfig, chain, finish, sentinel, write_run

from aipo_hpc import errors
from aipo_hpc.errors import InputNotVisible, RunError
from aipo_hpc.failures import KINDS, classify
from aipo_hpc.graph import Graph
from aipo_hpc.store import Run
from aipo_hpc.worker import Envelope

A, B, C = "iter-00/a", "iter-00/b", "iter-00/c"


@pytest.fixture(autouse=True)
def _on_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of any job, and with the process's variables as they were afterwards."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "SUBMITIT")):
            monkeypatch.delenv(name)
    for name in ("OMP_NUM_THREADS", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


class Workshop:
    """A run in which shards are worked on by hand."""

    def __init__(self, folder: Path, payload_timeout: float = 0.3) -> None:
        self.log, self.reason = folder / "executions", folder / "reason"
        self.graph: Graph = chain(config=TouchConfig(executions=str(self.log), fail=str(self.reason)))
        self.run = write_run(folder / "run", self.graph, payload_timeout)

    def work(self, job: str, shard: int, submission: str = "s-1", index: int = 0) -> None:
        Envelope(str(self.run.path), job, shard, submission, index, 3).run()

    def executions(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def done(self, job: str) -> dict[int, object]:
        return dict(Run(self.run.path).job(job).done(self.graph.fingerprints[job]))

    def attempts(self, job: str, shard: int) -> list[str]:
        return sorted(path.name for path in (self.run.path / job / "shards" / f"{shard:05d}").glob("*"))


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


# -- work ------------------------------------------------------------------------------------------------------------


def test_a_shard_is_worked_on_and_its_sentinel_tells_how(shop: Workshop) -> None:
    before = time.time()
    shop.work(A, 2, "s-9", 4)
    (made,) = shop.run.job(A).done(shop.graph.fingerprints[A]).values()
    assert (made.shard, made.attempt, made.fence, made.rows, made.num_processes) == (2, "s-9.4.r0", 3, 1, 1)
    assert before <= made.started <= made.ended <= time.time() and made.host == os.uname().nodename
    (output,) = made.outputs
    (path,) = shop.run.job(A).files(made)
    assert (output.path, output.bytes, path.read_text()) == (OUT, path.stat().st_size, "x iter-00/a 2\n")


def test_a_shard_reads_its_own_input_shard_and_a_whole_reader_all_in_order(shop: Workshop) -> None:
    for job in (A, B):
        for shard in (3, 1, 0, 2):
            shop.work(job, shard)
    shop.work(C, 0)
    (made,) = shop.run.job(C).done(shop.graph.fingerprints[C]).values()
    (path,) = shop.run.job(C).files(made)
    own = [f"x iter-00/a {shard}\nx iter-00/b {shard}\n" for shard in range(4)]
    assert path.read_text() == "".join(own) + "x iter-00/c 0\n"
    sources = shop.run.job(B).done(shop.graph.fingerprints[B])
    assert made.inputs == {"source": {"job": B, "sentinels": [sources[shard].digest for shard in range(4)]}}


def test_a_second_attempt_at_a_finished_shard_does_nothing(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.work(A, 1, "s-1")
    shop.work(A, 1, "s-2")
    assert shop.executions() == ["iter-00/a 1"]
    assert shop.attempts(A, 1) == ["s-1.0.r0"]
    assert "iter-00/a shard 1: is done already" in capsys.readouterr().out


def test_of_two_attempts_at_once_the_first_wins_and_the_other_cleans_up(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fakes

    work = fakes.run

    def overtaken(config: TouchConfig, task: object) -> object:
        outcome = work(config, task)  # type: ignore[arg-type]
        monkeypatch.setattr(fakes, "run", work)
        shop.work(A, 0, "s-2")
        return outcome

    monkeypatch.setattr(fakes, "run", overtaken)
    shop.work(A, 0, "s-1")
    assert shop.executions() == ["iter-00/a 0"] * 2
    assert shop.attempts(A, 0) == ["s-2.0.r0"]
    assert [made.attempt for made in shop.done(A).values()] == ["s-2.0.r0"]  # type: ignore[attr-defined]
    assert "iter-00/a shard 0: another attempt was first" in capsys.readouterr().out
    assert shop.run.job(A).failures() == []


def test_a_requeued_task_is_another_attempt(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    shop.work(A, 0)
    assert shop.attempts(A, 0) == ["s-1.0.r2"]


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_a_worker_whose_input_has_no_sentinel_does_not_start_and_says_so_in_bounded_time(shop: Workshop) -> None:
    began = time.monotonic()
    with pytest.raises(
        InputNotVisible, match=r"iter-00/a: no valid sentinel of shards \[2\] is visible on .* after 0\.3 s"
    ):
        shop.work(B, 2)
    assert time.monotonic() - began < 10
    assert shop.executions() == [] and shop.attempts(B, 2) == []
    (failure,) = shop.run.job(B).failures()
    assert (failure.kind, failure.shard) == ("input_not_visible", 2)


def test_a_worker_names_all_missing_shards_and_what_is_wrong_with_those_that_are_there(shop: Workshop) -> None:
    finish(shop.run, shop.graph, B, 1)
    finish(shop.run, shop.graph, B, 2)
    damaged = shop.run.path / B / "done" / "00002.json"
    damaged.write_text(damaged.read_text()[:-9])
    with pytest.raises(InputNotVisible, match=r"shards \[0, 2, 3\] .*00002\.json: not believed"):
        shop.work(C, 0)


def test_a_sentinel_of_other_settings_is_no_input(shop: Workshop) -> None:
    other = chain(config=TouchConfig(text="y"))
    shop.run.job(A).publish(sentinel(other, A, 0))
    with pytest.raises(InputNotVisible, match="it was made with other settings"):
        shop.work(B, 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), r"states 2 bytes, but on .* it is not there after 0\.3 s"),
        (lambda path: path.write_text("x"), r"states 2 bytes, but on .* it is 1 bytes"),
        (lambda path: path.write_text("y\n"), "of other content"),
    ],
    ids=["gone", "cut", "altered"],
)
def test_a_worker_whose_input_is_not_what_its_sentinel_states_does_not_start(shop: Workshop, spoil, message) -> None:
    spoil(shop.run.job(A).files(finish(shop.run, shop.graph, A, 1))[0])
    with pytest.raises(InputNotVisible, match=message):
        shop.work(B, 1)
    assert shop.executions() == []


def test_an_input_that_appears_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Workshop(tmp_path, payload_timeout=60.0)
    sleep = time.sleep

    def meanwhile(seconds: float) -> None:
        monkeypatch.setattr(time, "sleep", sleep)
        finish(shop.run, shop.graph, A, 3)

    monkeypatch.setattr(time, "sleep", meanwhile)
    shop.work(B, 3)
    assert list(shop.done(B)) == [3]


def test_a_job_folder_without_its_settings_says_what_to_type(shop: Workshop) -> None:
    (shop.run.path / A / "job.json").write_text("{")
    with pytest.raises(RunError, match=r"no readable job\.json\. Type the launch command again"):
        shop.work(A, 0)


# -- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_is_recorded_with_traceback_place_and_log_and_raised_again(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.reason.write_text("ZeroDivisionError by shard two")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    with pytest.raises(ZeroDivisionError):
        shop.work(A, 2, "s-7", 5)
    (failure,) = Run(shop.run.path).job(A).failures()
    assert (failure.job, failure.shard, failure.attempt, failure.fence) == (A, 2, "s-7.5.r0", 3)
    assert (failure.kind, failure.message) == ("error", "ZeroDivisionError: by shard two")
    assert "Traceback (most recent call last)" in failure.traceback and "fakes.py" in failure.traceback
    assert failure.host == os.uname().nodename
    assert failure.log == str(shop.run.job(A).logs / "41_5_0_log.out")
    assert shop.done(A) == {} and shop.attempts(A, 2) == ["s-7.5.r0"], "what it has done so far is kept"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.DiskFull("full"), "disk_full"),
        (OSError(errno.ENOSPC, "no space"), "disk_full"),
        (OSError(errno.EDQUOT, "quota"), "disk_full"),
        (OSError(errno.EIO, "input/output error"), "error"),
        (errors.InputNotVisible("late"), "input_not_visible"),
        (errors.DataError("empty"), "user_error"),
        (errors.RecipeError("beta"), "user_error"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "out_of_memory"),
        (RuntimeError("device-side assert"), "error"),
        (errors.ClusterError("no address"), "error"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_errors_are_told_apart(error: Exception, kind: str) -> None:
    assert classify(error) == kind
    assert KINDS[kind].advice
