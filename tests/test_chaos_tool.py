"""The judge of tools/chaos finds what it is there to find, its user only types again, its gremlin leaves out no fault."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _chaos import user as users
from _chaos.faults import FAULTS, Done
from _chaos.gremlin import Gremlin
from _chaos.outcome import Execution, Outcome, differences, made
from _chaos.user import HumanNeededError, User
from fakes import chain, sentinel

from aipo_hpc.sentinel import Output

A = "iter-00/a"


def a_user(folder: Path, script: str) -> User:
    return User([sys.executable, "-c", script], os.environ, folder / "log")


@dataclass
class Seen:
    """What a user sees of a run."""

    progress: Callable[[], int] = lambda: 0
    whole: bool = True
    goes_on: bool = False

    def complete(self) -> bool:
        return self.whole

    def at_work(self) -> bool:
        return self.goes_on

    def num_done(self) -> int:
        return self.progress()


NOTHING = Seen()


def attend(user: User, until: Callable[[], bool], run: Seen = NOTHING) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        user.attend(run)
        time.sleep(0.02)


def test_a_killed_command_is_typed_again_until_it_finishes(tmp_path: Path) -> None:
    user = a_user(tmp_path, f"import os, time; time.sleep(0 if os.path.exists({str(tmp_path / 'go')!r}) else 60)")
    attend(user, lambda: user.running)
    assert user.kill() and not user.running
    (tmp_path / "go").touch()
    attend(user, lambda: user.finished)
    assert (user.launches, user.exits) == (2, [])


def test_a_command_that_ended_well_is_typed_once_more_when_that_is_wanted(tmp_path: Path) -> None:
    user = a_user(tmp_path, "")
    attend(user, lambda: user.finished)
    user.attend(NOTHING)
    assert user.launches == 1
    user.type_once_more()
    attend(user, lambda: user.finished)
    assert user.launches == 2


def test_a_run_that_was_passed_on_is_left_alone_and_typed_again_when_nothing_of_it_is_at_work(tmp_path: Path) -> None:
    user = a_user(tmp_path, "")
    run = Seen(whole=False, goes_on=True)
    attend(user, lambda: user.launches == 1 and not user.running, run)
    user.attend(run)
    assert user.launches == 1 and not user.finished
    run.goes_on = False
    attend(user, lambda: user.launches == 2 and not user.running, run)
    run.whole = True
    attend(user, lambda: user.finished, run)
    assert user.launches == 2


def test_a_command_that_fails_for_ever_without_getting_further_needs_a_human(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users, "PATIENCE", 2)
    user = a_user(tmp_path, "raise SystemExit('UserError: mend it')")
    with pytest.raises(HumanNeededError, match=r"(?s)3 launches in a row did nothing.*mend it"):
        attend(user, lambda: False)
    assert "UserError: mend it" in user.exits


def test_a_command_that_fails_but_gets_further_is_typed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "PATIENCE", 1)
    user = a_user(tmp_path, "raise SystemExit(1)")
    done = iter(range(100))
    attend(user, lambda: user.launches == 4 and not user.running, Seen(lambda: next(done)))


def execution(begin: float, end: float, shard: int = 0) -> Execution:
    return Execution(A, shard, "aipo-cafe-1", 0, begin, end, 1)


def test_two_executions_of_a_shard_at_the_same_time_are_found() -> None:
    assert execution(10, 20).overlaps(execution(15, 30))
    assert execution(10, 40).overlaps(execution(15, 30))
    assert not execution(10, 20).overlaps(execution(20, 30)), "one after the other"
    assert not execution(10, 20).overlaps(execution(15, 30, shard=1)), "another shard"
    assert not execution(10, 20).overlaps(replace(execution(15, 30), extra=True)), "one that does part of it"


def test_the_execution_that_made_a_shard_is_told_from_a_wasted_one() -> None:
    done = {0: replace(sentinel(chain(), A, 0, "aipo-cafe-1.0.r1"), ended=25.0)}
    assert made(execution(20, 26), done)
    assert not made(execution(5, 10), done), "the one that was requeued"
    assert not made(replace(execution(20, 26), submission="aipo-cafe-2"), done)


def test_a_result_that_differs_or_is_missing_is_found() -> None:
    def shard(content: str, name: str = "rows.parquet") -> dict[int, object]:
        return {0: sentinel(chain(), A, 0, outputs=(Output(name, 1, content),))}

    assert differences(A, shard("aa"), shard("aa")) == []  # type: ignore[arg-type]
    assert differences(A, shard("aa"), shard("bb")) == [f"{A} shard 0: rows.parquet"]  # type: ignore[arg-type]
    assert len(differences(A, shard("aa"), shard("aa", "other.parquet"))) == 2  # type: ignore[arg-type]
    assert differences(A, {}, shard("aa")) == [f"{A}: shards [0] in one of them only"]  # type: ignore[arg-type]
    assert differences(A, shard("a", "metrics.jsonl"), shard("b", "metrics.jsonl")) == []  # type: ignore[arg-type]


def test_any_broken_promise_is_told() -> None:
    assert Outcome().kept
    for broken in (
        Outcome(duplicates=["x"]),
        Outcome(differences=["x"]),
        Outcome(rows_lost=1),
        Outcome(commands=1),
    ):
        assert not broken.kept
    total = Outcome(shards=2, executions=3)
    total.add(Outcome(shards=2, executions=2, duplicates=["x"]))
    assert (total.shards, total.executions, total.kept) == (4, 5, False)
    assert "| shard executions / shards | 5 / 4 |" in total.table()


def test_a_fault_that_is_not_possible_yet_comes_later_and_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is the only kind there is, and beside one that would have taken all places by then."""
    for kinds in (["late"], ["late", "soon"]):
        world = SimpleNamespace(
            user=SimpleNamespace(attend=lambda world: None, finished=False, log="", kill=lambda: None)
        )
        made = Gremlin(world, 1, pause=(0.0, 0.1), most=3, kinds=kinds, tell=print)  # type: ignore[arg-type]
        answers = iter([None, None])

        def late(world: object, draw: object, answers: Any = answers) -> Done | None:
            return next(answers, Done("late"))

        monkeypatch.setitem(FAULTS, "late", late)  # type: ignore[arg-type]
        monkeypatch.setitem(FAULTS, "soon", lambda world, draw: Done("soon"))  # type: ignore[arg-type]
        world.user.attend = lambda world, made=made: setattr(world.user, "finished", made.injected.total() == 3)
        made.disturb(30)
        print(dict(made.injected))
        assert made.injected.total() == 3 and made.injected["late"] >= 1
