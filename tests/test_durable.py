"""Durable writes: whole or not at all, and a full disk that says so."""

import errno
import os
from pathlib import Path

import pytest
from fakes import chain, fill, sentinel, small_disk, write_run

from aipo_hpc.durable import full_disk_named, hash_file, link_new, list_names, visible_size, write_durably
from aipo_hpc.errors import DiskFull
from aipo_hpc.failures import classify
from aipo_hpc.journal import Journal
from aipo_hpc.progress import PROGRESS, Progress
from aipo_hpc.rows import Candidate, Message, Responses, write_rows
from aipo_hpc.sentinel import Failure
from aipo_hpc.store import Run
from aipo_hpc.task import Task

ADVICE = "Free space .* type the same command again"


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", "old")
    write_durably(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_durably(tmp_path / "file", "\ud800")
    assert (tmp_path / "file").read_text() == "old"


def test_a_link_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1")
    (tmp_path / "two").write_text("2")
    assert link_new(tmp_path / "one", tmp_path / "final")
    assert not link_new(tmp_path / "two", tmp_path / "final")
    assert (tmp_path / "final").read_text() == "1"
    assert os.listdir(tmp_path) == ["final"]


def test_an_absent_folder_is_empty_and_an_absent_file_has_no_size(tmp_path: Path) -> None:
    assert list_names(tmp_path / "nowhere") == []
    assert visible_size(tmp_path / "nowhere" / "file") is None


def test_a_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_and_no_quota_are_named_with_place_and_advice(tmp_path: Path, number: int) -> None:
    with pytest.raises(DiskFull, match=rf"{tmp_path}: .*{ADVICE}"), full_disk_named(tmp_path):
        raise OSError(number, "full")
    assert classify(OSError(number, "full")) == "disk_full"


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), full_disk_named(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_full_disk_stops_a_sentinel_and_the_run_goes_on_once_there_is_space(tmp_path: Path) -> None:
    graph = chain()
    with small_disk(tmp_path / "disk") as disk:
        run = write_run(disk / "run", graph)
        folder = run.job("iter-00/a")
        folder.begin_attempt(0, "one")
        ballast = fill(disk)
        with pytest.raises(DiskFull, match=rf"00000\.json: No space left on device\. {ADVICE}"):
            folder.publish(sentinel(graph, "iter-00/a", 0))
        assert Run(run.path).job("iter-00/a").done(graph.fingerprints["iter-00/a"]) == {}
        ballast.unlink()
        assert folder.publish(sentinel(graph, "iter-00/a", 0))
        assert list(Run(run.path).job("iter-00/a").done(graph.fingerprints["iter-00/a"])) == [0]


def test_a_full_disk_stops_a_failure_record_which_is_then_not_believed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run = write_run(disk / "run", chain())
        ballast = fill(disk)
        failure = Failure("iter-00/a", 0, "s-1.0.r0", 1, "error", "m" * 4000)
        with pytest.raises(DiskFull, match=ADVICE):
            run.job("iter-00/a").record_failure(failure)
        assert Run(run.path).job("iter-00/a").failures() == []
        ballast.unlink()
        run.job("iter-00/a").record_failure(failure)
        assert Run(run.path).job("iter-00/a").failures() == [failure]


def test_a_full_disk_stops_the_journal_and_the_next_line_is_whole(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run = write_run(disk / "run", chain())
        journal = Journal(run)
        journal.launch()
        ballast = fill(disk)

        def intend_many() -> None:
            for _ in range(200):
                journal.intend("cafe", "iter-00/a", tuple(range(50)), ())

        with pytest.raises(DiskFull, match=rf"journal\.jsonl: .*{ADVICE}"):
            intend_many()
        believed = set(journal.submissions)
        assert set(Journal(run).submissions) == believed, "an intent that could not be kept must not count"
        ballast.unlink()
        again = Journal(run)
        made = again.intend("cafe", "iter-00/a", (0,), ())
        assert set(Journal(run).submissions) == {*believed, made.name}


def test_a_full_disk_stops_a_new_run_directory(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        fill(disk)
        with pytest.raises(DiskFull, match=ADVICE):
            Run(disk).create()


def responses(number: int) -> Responses:
    text = f"{number} " * 200
    return Responses(f"p{number}", "why?", [Message("user", "why?")], [Candidate(text, "stop", 3)])


def test_a_full_disk_stops_progress_and_finished_rows_are_taken_over_once_there_is_space(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        for name in ("one", "two"):
            (disk / name).mkdir()
        ballast = fill(disk)
        ballast.write_bytes(b"x" * (ballast.stat().st_size - 24 * 1024))

        def finish_many() -> None:
            with Progress(Task("iter-00/generate", 0, 0, 1, 7, {}, disk / "one"), Responses) as progress:
                for number in range(500):
                    progress.append(responses(number))

        with pytest.raises(DiskFull, match=rf"{PROGRESS}: .*{ADVICE}"):
            finish_many()
        ballast.unlink()
        task = Task("iter-00/generate", 0, 0, 1, 7, {}, disk / "two", (disk / "one",))
        with Progress(task, Responses) as progress:
            assert 5 < progress.num_taken_over < 100
            for number in range(20):
                if f"p{number}" not in progress:
                    progress.append(responses(number))
            progress.finish(f"p{number}" for number in range(20))
        write_rows(tmp_path / "undisturbed.parquet", [responses(number) for number in range(20)], Responses)
        assert (disk / "two" / "rows.parquet").read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()


def test_a_full_disk_stops_the_final_rows(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        (disk / "one").mkdir()
        with Progress(Task("iter-00/generate", 0, 0, 1, 7, {}, disk / "one"), Responses) as progress:
            progress.append(responses(1))
            progress.sync()
            fill(disk)
            with pytest.raises(DiskFull, match=rf"rows\.parquet: .*{ADVICE}"):
                progress.finish(["p1"])
