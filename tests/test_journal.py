"""The journal: torn lines cost themselves only, and submissions come back as they were."""

from pathlib import Path

import pytest

from aipo_hpc.clusters import Dependency
from aipo_hpc.journal import Journal
from aipo_hpc.store import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.create()
    return run


def path(run: Run) -> Path:
    return run.path / "journal.jsonl"


def test_a_run_without_a_journal_has_no_past(run: Run) -> None:
    assert run.read_journal() == []
    assert (Journal(run).fence, Journal(run).submissions) == (0, {})


def test_events_are_read_in_order_with_their_fields(run: Run) -> None:
    run.append_journal("one", text="é\n\u2028", numbers=[1, 2])
    run.append_journal("two")
    first, second = run.read_journal()
    assert (first["event"], first["text"], first["numbers"]) == ("one", "é\n\u2028", [1, 2])
    assert second["event"] == "two"
    assert second["time"] >= first["time"]


@pytest.mark.parametrize("torn", [b'{"time": 1.0, "event": "two", "te', b"{", b"\xff", b'{"time": 1.0, "event": "\xc3'])
def test_a_torn_last_line_is_left_out_and_the_next_one_does_not_glue_to_it(run: Run, torn: bytes) -> None:
    run.append_journal("one")
    with path(run).open("ab") as file:
        file.write(torn)
    assert [event["event"] for event in run.read_journal()] == ["one"]
    run.append_journal("three")
    run.append_journal("four")
    assert [event["event"] for event in run.read_journal()] == ["one", "three", "four"]


def test_a_whole_line_that_only_lost_its_newline_is_kept(run: Run) -> None:
    run.append_journal("one")
    path(run).write_bytes(path(run).read_bytes()[:-1])
    run.append_journal("two")
    assert [event["event"] for event in run.read_journal()] == ["one", "two"]


@pytest.mark.parametrize("line", ["[]", "7", "null", "{}", ""])
def test_a_line_that_is_no_event_is_left_out(run: Run, line: str) -> None:
    path(run).write_text(line + "\n")
    run.append_journal("one")
    assert [event["event"] for event in run.read_journal()] == ["one"]


def test_fencing_numbers_rise_with_every_launch(run: Run) -> None:
    assert [Journal(run).launch(), Journal(run).launch(), Journal(run).launch()] == [1, 2, 3]
    assert Journal(run).fence == 3


def test_a_submission_and_its_answer_come_back_as_they_were(run: Run) -> None:
    journal = Journal(run)
    journal.launch()
    first = journal.intend("cafe", "iter-00/a", (0, 2), ())
    journal.submitted(first, "41")
    second = journal.intend("cafe", "iter-00/b", (0, 2), (Dependency(first.name, "aftercorr"),))
    journal.submitted(second, "42")
    again = Journal(run)
    assert [each.id for each in again.submissions.values()] == ["41", "42"]
    back = again.submissions[second.name]
    assert (back.job, back.shards, back.after, back.fence) == (second.job, second.shards, second.after, 1)
    assert back.time == pytest.approx(second.time, abs=0.01)


def test_an_intent_without_an_answer_stays_without_an_id(run: Run) -> None:
    made = Journal(run).intend("cafe", "iter-00/a", (0,), ())
    assert Journal(run).submissions[made.name].id is None


def test_a_refused_submission_is_forgotten_but_its_name_is_not_used_again(run: Run) -> None:
    journal = Journal(run)
    made = journal.intend("cafe", "iter-00/a", (0,), ())
    journal.refused(made, "no such partition")
    again = Journal(run)
    assert again.submissions == {}
    assert again.intend("cafe", "iter-00/a", (0,), ()).name != made.name


def test_a_reset_forgets_the_submissions_of_its_jobs_only(run: Run) -> None:
    journal = Journal(run)
    kept = journal.intend("cafe", "iter-00/a", (0,), ())
    gone = journal.intend("cafe", "iter-00/b", (0,), ())
    journal.note("reset", jobs=["iter-00/b"])
    again = Journal(run)
    assert list(again.submissions) == [kept.name]
    assert again.intend("cafe", "iter-00/b", (0,), ()).name not in (kept.name, gone.name)


def test_an_answer_whose_intent_was_torn_is_ignored(run: Run) -> None:
    run.append_journal("submitted", name="aipo-cafe-1", id="41")
    assert Journal(run).submissions == {}


def test_names_are_unique_over_launches(run: Run) -> None:
    names = [Journal(run).intend("cafe", "iter-00/a", (0,), ()).name for _ in range(3)]
    assert names == ["aipo-cafe-1", "aipo-cafe-2", "aipo-cafe-3"]
