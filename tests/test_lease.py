"""The lease: one driver per run, with real processes that start together, die, and come back."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import eventually

from aipo_hpc import lease
from aipo_hpc.errors import RunError
from aipo_hpc.journal import Journal
from aipo_hpc.lease import Lease, is_alive, read_owner, request_cancel
from aipo_hpc.processes import start_time
from aipo_hpc.store import Run

HOLD = """
import sys, time
from pathlib import Path
from aipo_hpc.errors import RunError
from aipo_hpc.lease import Lease
from aipo_hpc.store import Run
run, go = Run(Path(sys.argv[1])), Path(sys.argv[2])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
try:
    with Lease(run):
        print("held", flush=True)
        sys.stdin.read()
except RunError as error:
    print("refused", error, flush=True)
"""

STRUGGLE = """
import os, random, signal, sys, time
from pathlib import Path
from aipo_hpc.errors import RunError
from aipo_hpc.lease import Lease
from aipo_hpc.processes import start_time
from aipo_hpc.store import Run
run, witness, draw = Run(Path(sys.argv[1])), Path(sys.argv[2]), random.Random(os.getpid())
deadline = time.monotonic() + 60
while True:
    assert time.monotonic() < deadline
    try:
        with Lease(run):
            if witness.exists() and start_time(int(witness.read_text())) is not None:
                sys.exit(f"process {witness.read_text()} holds it as well")
            witness.write_text(str(os.getpid()))
            time.sleep(draw.random() * 0.005)
            assert witness.read_text() == str(os.getpid()), "somebody came in"
            if draw.random() < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            witness.unlink()
        sys.exit(0)
    except RunError:
        time.sleep(draw.random() * 0.01)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.create()
    return run


class Holders:
    """Processes that try to take a run's lease when told to."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.go = run, folder / "go"
        self.processes: list[subprocess.Popen[str]] = []

    def prepare(self, number: int) -> list[subprocess.Popen[str]]:
        argv = [sys.executable, "-c", HOLD, str(self.run.path), str(self.go)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        made = [subprocess.Popen(argv, text=True, **pipes) for _ in range(number)]  # type: ignore[call-overload]
        self.processes += made
        for process in made:
            assert self.says(process) == "ready"
        return made

    def says(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    def one(self) -> subprocess.Popen[str]:
        (process,) = self.prepare(1)
        self.go.touch()
        assert self.says(process) == "held"
        return process


@pytest.fixture
def holders(run: Run, tmp_path: Path) -> Iterator[Holders]:
    made = Holders(run, tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def owner_file(run: Run) -> Path:
    return run.path / "driver.lease" / "owner.json"


def lease_of(run: Run, **fields: Any) -> dict[str, Any]:
    """A lease left by somebody: by default a living process on another host."""
    owner = {
        "token": "elsewhere:77:1", "host": "elsewhere", "pid": 77, "started": "5", "boot_id": "x", "heartbeat": time.time()
    }  # fmt: skip
    owner.update(fields)
    owner_file(run).parent.mkdir()
    owner_file(run).write_text(json.dumps(owner))
    return owner


# -- one holds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["nothing", "a dead owner", "an empty folder"])
def test_of_drivers_started_at_once_exactly_one_holds(run: Run, holders: Holders, before: str) -> None:
    if before == "a dead owner":
        lease_of(run, heartbeat=time.time() - 1000)
    elif before == "an empty folder":
        owner_file(run).parent.mkdir()
    processes = holders.prepare(6)
    holders.go.touch()
    said = [holders.says(process) for process in processes]
    assert sorted(words.split()[0] for words in said) == ["held"] + ["refused"] * 5
    (holder,) = (process for process, words in zip(processes, said, strict=True) if words == "held")
    for words in said:
        assert words == "held" or f"is being driven by process {holder.pid} on {platform.node()}" in words
    owner = read_owner(run)
    assert owner is not None and owner["pid"] == holder.pid and is_alive(owner)


def test_drivers_that_come_go_and_are_killed_never_hold_it_together(run: Run, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", STRUGGLE, str(run.path), str(tmp_path / "witness")]
    killed = 0
    for _ in range(3):
        processes = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(6)]
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode in (0, -signal.SIGKILL), errors
            killed += process.returncode != 0
    taken_over = [event for event in run.read_journal() if event["event"] == "lease_taken_over"]
    print(f"18 drivers, {killed} killed while they held it, {len(taken_over)} taken over, never two at once")
    assert killed > 0 and len(taken_over) >= killed - 1


def test_a_second_driver_of_a_living_one_is_told_who_where_and_what_to_type(run: Run, holders: Holders) -> None:
    process = holders.one()
    with pytest.raises(RunError) as refused, Lease(run):
        pass
    assert re.search(
        rf"{run.path}: is being driven by process {process.pid} on {platform.node()} .*"
        rf"aipo_hpc status {run.path}; to stop it: python -m aipo_hpc cancel {run.path}",
        str(refused.value),
    )


# -- taken over ------------------------------------------------------------------------------------------------------


def test_a_killed_owner_on_this_host_is_replaced_at_once(run: Run, holders: Holders) -> None:
    process = holders.one()
    owner = read_owner(run)
    process.kill()
    process.wait()
    began = time.monotonic()
    with Lease(run) as taken:
        assert taken.holds()
        assert time.monotonic() - began < 10, "no waiting for an expiry"
    (event,) = [event for event in run.read_journal() if event["event"] == "lease_taken_over"]
    assert event["of"] == owner


def test_a_killed_owner_that_nobody_waited_for_is_dead_too(run: Run, holders: Holders) -> None:
    process = holders.one()
    process.kill()
    assert eventually(lambda: start_time(process.pid) is None), "a zombie counts as dead"
    with Lease(run) as taken:
        assert taken.holds()


def test_a_foreign_owner_is_replaced_when_its_sign_of_life_is_old(run: Run) -> None:
    lease_of(run, heartbeat=time.time() - 121)
    with Lease(run) as taken:
        assert taken.holds()


def test_a_foreign_owner_that_gave_a_sign_of_life_is_left_alone(run: Run) -> None:
    owner = lease_of(run, heartbeat=time.time() - 60)
    with pytest.raises(RunError, match=r"process 77 on elsewhere \(last sign of life 60 s ago\)"), Lease(run):
        pass
    assert json.loads(owner_file(run).read_text()) == owner
    assert os.listdir(run.path) == ["driver.lease"], "the refused one leaves nothing behind"


def test_a_later_process_with_the_pid_of_the_owner_is_not_taken_for_it(run: Run) -> None:
    with Lease(run):
        here = read_owner(run)
    assert here is not None
    lease_of(run, **{**here, "started": "1"})
    with Lease(run) as taken:
        assert taken.holds()


def test_after_a_reboot_the_sign_of_life_decides(run: Run) -> None:
    with Lease(run):
        here = read_owner(run)
    assert here is not None
    assert is_alive({**here, "boot_id": "the one before"})
    assert not is_alive({**here, "boot_id": "the one before", "heartbeat": time.time() - 121})


@pytest.mark.parametrize("torn", ["", '{"token": "elsewh', "[]", "{}"])
def test_a_lease_without_a_readable_owner_is_replaced_when_it_is_old(run: Run, torn: str) -> None:
    lease_of(run)
    owner_file(run).write_text(torn)
    os.utime(owner_file(run).parent, (time.time() - 60,) * 2)
    with Lease(run) as taken:
        assert taken.holds()


def test_a_lease_without_a_readable_owner_that_is_young_is_waited_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 1.0)
    lease_of(run)
    owner_file(run).write_text("{")
    began = time.monotonic()
    with Lease(run) as taken:
        assert taken.holds()
    assert time.monotonic() - began > 0.8


def test_of_two_that_find_an_unreadable_lease_the_second_does_not_take_the_first_ones_away(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease_of(run)
    owner_file(run).write_text("{")
    os.utime(owner_file(run).parent, (time.time() - 60,) * 2)
    first, second = Lease(run), Lease(run)
    rename = os.rename

    def rename_late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        first.__enter__()  # after the second one has looked, before it acts
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_late)
    second._take_over()
    assert os.rename is rename and first.holds()
    first.__exit__(None, None, None)


# -- while it is held ------------------------------------------------------------------------------------------------


def test_the_lease_is_renewed_while_it_is_held_and_gone_afterwards(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.02)
    with Lease(run) as held:
        first = read_owner(run)
        assert first is not None and first["pid"] == os.getpid()
        assert eventually(lambda: (owner := read_owner(run)) is not None and owner["heartbeat"] > first["heartbeat"])
        assert held.holds()
    assert read_owner(run) is None and os.listdir(run.path) == []


def test_the_lease_is_released_when_the_driver_fails(run: Run) -> None:
    with pytest.raises(ZeroDivisionError), Lease(run):
        raise ZeroDivisionError
    assert os.listdir(run.path) == []


def test_who_lost_the_lease_knows_it_and_leaves_the_other_ones_in_place(run: Run) -> None:
    with Lease(run) as held:
        owner_file(run).write_text(json.dumps({**json.loads(owner_file(run).read_text()), "token": "another"}))
        assert not held.holds()
    owner = read_owner(run)
    assert owner is not None and owner["token"] == "another"


def test_fencing_numbers_grow_from_holder_to_holder(run: Run) -> None:
    fences = []
    for _ in range(3):
        with Lease(run):
            fences.append(Journal(run).launch())
    assert fences == [1, 2, 3]


def test_a_request_to_stop_reaches_the_holder_and_not_the_next_one(run: Run) -> None:
    with Lease(run) as held:
        assert not held.cancel_requested()
        request_cancel(run)
        assert held.cancel_requested()
    with Lease(run) as another:
        assert not another.cancel_requested()


def test_a_request_to_stop_that_comes_too_late_is_no_error(run: Run) -> None:
    request_cancel(run)
    assert os.listdir(run.path) == []
