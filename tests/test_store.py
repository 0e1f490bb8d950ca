"""The run directory: what is believed, what is set aside, who wins."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import OUT, chain, finish, sentinel, small_disk

from aipo_hpc.errors import InputNotVisible, RunError
from aipo_hpc.graph import Graph
from aipo_hpc.job_folder import JobFolder
from aipo_hpc.sentinel import Failure, Sentinel
from aipo_hpc.store import Run

JOB = "iter-00/a"


def done_folder(run: Run) -> Path:
    return run.path / JOB / "done"


def shards(run: Run, graph: Graph) -> list[int]:
    """The finished shards as somebody sees them who looks for the first time."""
    return sorted(Run(run.path).job(JOB).done(graph.fingerprints[JOB]))


# -- sentinels -------------------------------------------------------------------------------------------------------


def test_a_published_sentinel_is_read_back_whole(run: Run, graph: Graph) -> None:
    made = finish(run, graph, JOB, 2)
    assert Run(run.path).job(JOB).done(graph.fingerprints[JOB]) == {2: made}
    assert run.job(JOB).files(made)[0].read_text() == "x\n"
    assert Sentinel.from_json(made.to_json()).digest == made.digest


def test_a_sentinel_is_plain_json_whose_digest_covers_all_that_comes_before_it(run: Run, graph: Graph) -> None:
    made = replace(
        finish(run, graph, JOB, 0), gpus=("x", "é"), counts={"b": 0.1, "a": 3}, scheduler={"slurm_job_id": "7"}
    )
    text = made.to_json()
    assert json.loads(text)["digest"] == made.digest
    again = Sentinel.from_json(text)
    assert again == made and again.to_json() == text, "so lineage is the same whoever tells it"
    assert text == made.to_json() and list(json.loads(text))[-1] == "digest"


def spoil_by_cutting(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def spoil_by_emptying(path: Path) -> None:
    path.write_text("")


def spoil_by_a_higher_row_count(path: Path) -> None:
    path.write_text(path.read_text().replace('"rows": 1', '"rows": 100'))


def spoil_by_another_kind_of_json(path: Path) -> None:
    path.write_text("[1, 2]\n")


def spoil_by_bytes_that_are_no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def spoil_by_a_word_after_its_end(path: Path) -> None:
    path.write_text(path.read_text() + "{}\n")


def spoil_by_dropping_its_digest(path: Path) -> None:
    path.write_text(path.read_text().partition(',\n "digest"')[0] + "\n}\n")


def spoil_by_a_field_that_is_not_known(path: Path) -> None:
    body = path.read_text().partition(',\n "digest"')[0] + ',\n "colour": "red"'
    path.write_text(f'{body},\n "digest": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n')


def spoil_by_moving_it_to_another_shard(path: Path) -> None:
    path.write_text(replace(Sentinel.from_json(path.read_text()), shard=3).to_json())


def spoil_by_another_fingerprint(path: Path) -> None:
    path.write_text(replace(Sentinel.from_json(path.read_text()), fingerprint="0" * 64).to_json())


SPOILERS = [value for name, value in list(globals().items()) if name.startswith("spoil_by_")]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_spoilt_sentinel_is_not_believed_and_told_once(run: Run, graph: Graph, spoil) -> None:
    finish(run, graph, JOB, 1)
    finish(run, graph, JOB, 2)
    spoil(done_folder(run) / "00002.json")
    folder = Run(run.path).job(JOB)
    for _ in range(3):
        assert list(folder.done(graph.fingerprints[JOB])) == [1]
    assert len(folder.reports) == 1
    assert "00002.json" in folder.reports[0]
    assert "counts as not done" in folder.reports[0]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_publishing_over_a_spoilt_sentinel_sets_that_aside(run: Run, graph: Graph, spoil) -> None:
    finish(run, graph, JOB, 2)
    spoil(done_folder(run) / "00002.json")
    watching = Run(run.path).job(JOB)
    assert watching.done(graph.fingerprints[JOB]) == {}
    assert run.job(JOB).publish(sentinel(graph, JOB, 2, "two"))
    assert watching.done(graph.fingerprints[JOB])[2].attempt == "two", (
        "who doubted the old one must believe the new one"
    )
    (aside,) = (run.path / "set-aside").iterdir()
    assert aside.name.startswith("iter-00.a.00002.json.")


def test_a_sentinel_that_is_listed_before_it_can_be_opened_is_believed_later(run: Run, graph: Graph) -> None:
    finish(run, graph, JOB, 0)
    folder = Run(run.path).job(JOB)
    real = done_folder(run) / "00000.json"
    hidden = real.rename(run.path / "hidden")
    real.symlink_to(hidden.with_name("not-there"))
    assert folder.done(graph.fingerprints[JOB]) == {}
    real.unlink()
    hidden.rename(real)
    assert list(folder.done(graph.fingerprints[JOB])) == [0]
    assert folder.reports == []


def test_of_two_attempts_the_first_wins_and_the_second_removes_its_folder(run: Run, graph: Graph) -> None:
    first, second = JobFolder(run.path, JOB), JobFolder(run.path, JOB)
    one, _ = first.begin_attempt(0, "one")
    two, _ = second.begin_attempt(0, "two")
    assert second.publish(sentinel(graph, JOB, 0, "two"))
    assert not first.publish(sentinel(graph, JOB, 0, "one"))
    assert two.is_dir() and not one.exists()
    assert run.job(JOB).done(graph.fingerprints[JOB])[0].attempt == "two"
    assert sorted(path.name for path in done_folder(run).iterdir()) == ["00000.json"]


def test_a_link_that_took_although_the_server_said_exists_keeps_its_payload(run: Run, graph: Graph) -> None:
    made = finish(run, graph, JOB, 0)
    assert run.job(JOB).publish(made), "its own sentinel stands there"
    assert run.job(JOB).files(made)[0].exists()


def test_an_attempt_done_again_under_its_own_name_replaces_its_sentinel_not_its_files(run: Run, graph: Graph) -> None:
    made = finish(run, graph, JOB, 0)
    assert run.job(JOB).publish(replace(made, ended=9.0))
    assert run.job(JOB).files(made)[0].exists()
    assert Run(run.path).job(JOB).done(graph.fingerprints[JOB])[0].ended == 9.0


def test_a_temporary_file_left_by_a_killed_attempt_disturbs_nobody(run: Run, graph: Graph) -> None:
    (done_folder(run) / ".00000.json.one.tmp").write_text("half")
    (done_folder(run) / ".00001.json.zero.tmp").write_text("half")
    assert shards(run, graph) == []
    finish(run, graph, JOB, 0)
    finish(run, graph, JOB, 1)
    assert shards(run, graph) == [0, 1]


def test_a_look_at_some_shards_reads_only_their_sentinels(run: Run, graph: Graph) -> None:
    finish(run, graph, JOB, 0)
    finish(run, graph, JOB, 1)
    spoil_by_cutting(done_folder(run) / "00001.json")
    folder = Run(run.path).job(JOB)
    assert list(folder.done(graph.fingerprints[JOB], only=(0,))) == [0]
    assert folder.reports == []


def test_shards_of_another_shard_count_are_not_taken_for_ours(run: Run, graph: Graph) -> None:
    for shard in range(4):
        finish(run, graph, JOB, shard)
    wider = chain(num_shards=8)
    assert shards(run, wider) == []


def publish_without_end(path: Path, graph: Graph, name: str) -> None:
    folder = Run(path).job(JOB)
    for number in range(1_000_000):
        folder.publish(sentinel(graph, JOB, number % 4, f"{name}-{number}"))
        (folder.path / "done" / f"{number % 4:05d}.json").unlink()


def test_a_kill_while_publishing_never_leaves_a_sentinel_that_is_wrong(run: Run, graph: Graph) -> None:
    draw, forking = random.Random(3), multiprocessing.get_context("fork")
    left = trial = 0
    deadline = time.monotonic() + 120
    while (trial < 15 or not left) and time.monotonic() < deadline:
        trial += 1
        process = forking.Process(target=publish_without_end, args=(run.path, graph, str(trial)))
        process.start()
        time.sleep(draw.random() * 0.03 * (1 + trial // 15))  # a busy machine starts processes late
        process.kill()
        process.join()
        folder = Run(run.path).job(JOB)
        left += len(folder.done(graph.fingerprints[JOB]))
        assert folder.reports == []
    assert left > 0, "no kill came between link and removal: the test proves nothing"
    for shard in range(4):
        run.job(JOB).publish(sentinel(graph, JOB, shard, "last"))
    assert shards(run, graph) == [0, 1, 2, 3]


# -- payload ---------------------------------------------------------------------------------------------------------


def test_payload_of_another_size_is_an_error_that_names_file_sizes_and_command(run: Run, graph: Graph) -> None:
    made = finish(run, graph, JOB, 0)
    run.job(JOB).files(made)[0].write_text("longer than it was")
    with pytest.raises(InputNotVisible, match=r"out\.txt: .* states 2 bytes, .* 18 bytes after 0\.1 s.*driver"):
        run.job(JOB).wait_for_payload(made, OUT, 0.1)


def test_payload_that_is_gone_is_an_error_after_a_bounded_wait(run: Run, graph: Graph) -> None:
    made = finish(run, graph, JOB, 0)
    run.job(JOB).files(made)[0].unlink()
    began = time.monotonic()
    with pytest.raises(InputNotVisible, match=r"not there after 0\.3 s"):
        run.job(JOB).wait_for_payload(made, OUT, 0.3)
    assert time.monotonic() - began < 2


def test_payload_altered_at_the_same_size_is_an_error(run: Run, graph: Graph) -> None:
    made = finish(run, graph, JOB, 0)
    run.job(JOB).files(made)[0].write_text("y\n")
    with pytest.raises(InputNotVisible, match="of other content"):
        run.job(JOB).wait_for_payload(made, OUT, 0.1)


def test_only_the_files_of_the_named_part_are_waited_for(run: Run, graph: Graph) -> None:
    made = finish(run, graph, JOB, 0)
    assert run.job(JOB).wait_for_payload(made, "model/", 0.0) == ()
    assert len(run.job(JOB).wait_for_payload(made, OUT, 0.0)) == 1


def test_a_retracted_sentinel_is_no_longer_done_and_not_deleted(run: Run, graph: Graph) -> None:
    finish(run, graph, JOB, 0)
    assert list(run.job(JOB).done(graph.fingerprints[JOB])) == [0]
    run.job(JOB).retract(0)
    assert run.job(JOB).done(graph.fingerprints[JOB]) == {}
    assert len(list((run.path / "set-aside").iterdir())) == 1


# -- attempts and failures -------------------------------------------------------------------------------------------


def test_earlier_attempts_are_told_oldest_first(run: Run) -> None:
    folder = run.job(JOB)
    for age, attempt in ((300, "b"), (200, "c"), (100, "a")):
        made, _ = folder.begin_attempt(0, attempt)
        os.utime(made, (time.time() - age,) * 2)
    _, earlier = folder.begin_attempt(0, "d")
    assert [path.name for path in earlier] == ["b", "c", "a"]


def test_an_attempt_that_vanishes_while_it_is_listed_is_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aipo_hpc.job_folder.list_names", lambda folder: ["gone"])
    _, earlier = run.job(JOB).begin_attempt(0, "one")
    assert earlier == ()


def failure(number: int) -> Failure:
    return Failure(JOB, 1, f"s-{number}.0.r0", 1, "error", f"message {number}", time=float(number))


def test_failures_are_kept_under_numbers_and_told_oldest_first(run: Run) -> None:
    paths = [run.job(JOB).record_failure(failure(number)).name for number in (2, 1, 3)]
    assert paths == ["00001.1.json", "00001.2.json", "00001.3.json"]
    assert [each.message for each in Run(run.path).job(JOB).failures()] == ["message 1", "message 2", "message 3"]


def test_a_failure_never_replaces_another_that_took_the_same_number(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.job(JOB).record_failure(failure(1))
    monkeypatch.setattr("aipo_hpc.job_folder.list_names", lambda folder: [])
    assert run.job(JOB).record_failure(failure(2)).name == "00001.2.json"


def test_a_torn_failure_record_is_left_out(run: Run) -> None:
    run.job(JOB).record_failure(failure(1))
    (run.path / JOB / "failed" / "00001.2.json").write_text('{"job": "iter')
    assert len(run.job(JOB).failures()) == 1


def test_a_torn_job_json_counts_as_none(run: Run) -> None:
    (run.path / JOB / "job.json").write_text("{")
    assert run.job(JOB).read_job() is None


# -- the directory ---------------------------------------------------------------------------------------------------


def test_a_new_run_directory_is_its_owners_alone(tmp_path: Path) -> None:
    run = Run(tmp_path / "deep" / "run")
    run.create()
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert list(run.path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_run_directory_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    with pytest.raises(RunError, match=rf"others may write to it \(mode {mode:o}\).*chmod go-w {tmp_path / 'run'}"):
        Run(tmp_path / "run").create()


def test_a_run_directory_below_a_file_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written .*run_dir="):
        Run(tmp_path / "file" / "run").create()


def test_a_file_in_place_of_the_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        Run(tmp_path / "run").create()


def test_a_read_only_place_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(RunError, match=r"cannot be written \(Read-only file system\).*run_dir="):
            Run(disk / "run").create()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=re.escape(f"{tmp_path}: not a run directory")):
        Run(tmp_path).read_recipe()


def test_a_damaged_recipe_is_named(run: Run) -> None:
    (run.path / "recipe.json").write_text("{")
    with pytest.raises(RunError, match=r"recipe\.json: damaged .*launch the recipe again"):
        run.read_recipe()


def test_setting_jobs_aside_moves_them_whole(run: Run, graph: Graph) -> None:
    made = finish(run, graph, JOB, 0)
    target = run.set_jobs_aside([JOB])
    assert not (run.path / JOB).exists()
    assert (target / JOB / "shards" / "00000" / made.attempt / OUT).read_text() == "x\n"
    assert run.job_names() == ["iter-00/b", "iter-00/c"]


def test_setting_the_same_job_aside_twice_within_a_second_keeps_both(run: Run, graph: Graph) -> None:
    targets = []
    for _ in range(2):
        finish(run, graph, JOB, 0)
        targets.append(run.set_jobs_aside([JOB]))
        run.job(JOB).create({})
    assert len({target / JOB for target in targets if (target / JOB / "done" / "00000.json").is_file()}) == 2
