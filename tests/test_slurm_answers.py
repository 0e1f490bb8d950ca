"""What Slurm answers, and what is made of it: whose job a line speaks of, what a refusal means, what a site forbids."""

import os
import stat
import time
from pathlib import Path

import pytest
from fakes import chain, write_run

from aipo_hpc.clusters import Submission
from aipo_hpc.clusters.slurm import SlurmCluster
from aipo_hpc.clusters.slurm_answers import parse_sacct, parse_squeue, parse_steps, starved
from aipo_hpc.errors import ClusterError, NoRoom, SubmitRefused
from aipo_hpc.recipe import SlurmConfig

NAME = "aipo-cafe-1"
SENT = time.mktime(time.strptime("2026-03-01T12:00:00", "%Y-%m-%dT%H:%M:%S"))
KNOWN = Submission(NAME, "iter-00/a", (0, 1), (), 1, SENT, "77")
UNKNOWN = Submission(NAME, "iter-00/a", (0, 1), (), 1, SENT, None)


def stub(folder: Path, name: str, script: str) -> None:
    """A client command that answers as a site would."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of client commands in front of all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    stub(folder, "scontrol", "echo 'MaxArraySize            = 1001'")
    stub(folder, "srun", "exit 1")
    return folder


# -- whose job a line speaks of --------------------------------------------------------------------------------------


def test_a_job_of_our_name_but_with_another_id_is_not_ours() -> None:
    lines = (
        f"{NAME}|77|2026-03-01T12:00:01|0|RUNNING|0:10|n1|None\n{NAME}|12|2026-03-01T12:00:01|1|RUNNING|0:10|n1|None\n"
    )
    assert list(parse_squeue(lines, {NAME: KNOWN})[NAME]) == [0]
    told = "".join(f"{NAME}|{each}|2026-03-01T12:00:01|FAILED|00:00:10|n1|1:0\n" for each in ("12_0", "77_1"))
    assert list(parse_sacct(told, {NAME: KNOWN})[NAME]) == [1]


def test_an_id_of_ours_that_was_given_to_another_name_is_not_ours() -> None:
    assert parse_squeue("else|77|2026-03-01T12:00:01|0|RUNNING|0:10|n1|None", {NAME: KNOWN}) == {}
    assert parse_sacct("else|77_0|2026-03-01T12:00:01|COMPLETED|00:00:10|n1|0:0", {NAME: KNOWN}) == {}


def test_a_submission_without_an_id_is_found_by_name_unless_the_job_is_older_than_its_intent() -> None:
    wanted = {NAME: UNKNOWN}
    assert parse_squeue(f"{NAME}|5|2026-03-01T12:00:02|0|PENDING|0:00|n1|Priority", wanted)[NAME][0].alive
    assert parse_squeue(f"{NAME}|5|2026-02-20T09:00:00|0|PENDING|0:00|n1|Priority", wanted) == {}
    assert parse_sacct(f"{NAME}|5_1|2026-02-20T09:00:00|COMPLETED|00:01:00|n1|0:0", wanted) == {}


def test_clocks_that_differ_a_little_are_forgiven() -> None:
    assert parse_squeue(f"{NAME}|5|2026-03-01T11:58:00|0|RUNNING|0:09|n1|None", {NAME: UNKNOWN})


def test_a_reason_may_hold_the_separator() -> None:
    state = parse_squeue(f"{NAME}|77|2026-03-01T12:00:01|0|FAILED|0:09|n1|a|b", {NAME: KNOWN})[NAME][0]
    assert state.detail == "Slurm: FAILED, a|b"


# -- what a refusal means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates", NoRoom),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job viol", NoRoom),
        ("sbatch: error: QOSGrpSubmitJobsLimit", NoRoom),
        ("sbatch: error: Batch job submission failed: Resource temporarily unavailable", NoRoom),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller", ClusterError),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", ClusterError),
        ("sbatch: error: RPC rate limit exceeded by this user, please try again", ClusterError),
        ("sbatch: error: Batch job submission failed: Invalid partition name specified", SubmitRefused),
        ("sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed", SubmitRefused),
    ],
)
def test_a_refusal_is_for_good_for_now_or_not_clear(
    site: Path, tmp_path: Path, words: str, error: type[ClusterError]
) -> None:
    stub(site, "sbatch", f"printf '%s\\n' '{words}' >&2; exit 1")
    graph = chain(2)
    cluster = SlurmCluster(SlurmConfig())
    with pytest.raises(ClusterError) as refusal:
        cluster.submit(write_run(tmp_path / "run", graph), graph.jobs["iter-00/a"], UNKNOWN, [])
    assert type(refusal.value) is error, refusal.value

    if error is SubmitRefused:
        with pytest.raises(SubmitRefused, match=r"iter-00/a: Slurm would not take this job"):
            cluster.check(graph)
    elif error is NoRoom:
        cluster.check(graph)
    else:
        with pytest.raises(ClusterError) as silence:
            cluster.check(graph)
        assert not isinstance(silence.value, SubmitRefused), "an outage is not the fault of the job's shape"


@pytest.mark.parametrize("command", ["squeue", "scancel", "scontrol"])
def test_a_client_command_that_is_limited_by_rate_is_an_answer_that_passes(site: Path, command: str) -> None:
    cluster = SlurmCluster(SlurmConfig())
    stub(site, "squeue", f"echo '{NAME}|77|2026-03-01T12:00:01'")
    stub(site, command, "echo 'slurm_load_jobs error: rate limit exceeded, please try again' >&2; exit 1")
    if command == "scancel":
        stub(site, "squeue", f"echo '{NAME}|77|2026-03-01T12:00:01'")
    calls = {"squeue": cluster.states, "scancel": cluster.cancel, "scontrol": lambda _: SlurmCluster(SlurmConfig())}
    with pytest.raises(ClusterError, match="rate limit"):
        calls[command]([KNOWN])


def test_a_user_without_the_right_to_run_sacct_is_told_what_squeue_knows(site: Path) -> None:
    stub(site, "squeue", f"echo '{NAME}|77|2026-03-01T12:00:01|0|RUNNING|0:10|n1|None'")
    stub(site, "sacct", "echo 'sacct: error: Access/permission denied' >&2; exit 1")
    assert list(SlurmCluster(SlurmConfig()).states([KNOWN])[NAME]) == [0], "what squeue forgot stays unknown"


# -- what a failure was ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "out_of_memory"),
    [("0:125", True), ("253", True), ("125", True), ("0:9", False), ("9", False), ("137", False), ("256", False),
     ("32000", False), ("1:0", False), ("125:0", False), ("0:0", False), ("0", False), ("", False), ("N/A", False)],
)  # fmt: skip
def test_only_one_exit_code_of_a_step_means_out_of_memory(code: str, out_of_memory: bool) -> None:
    """As Slurm wrote them of steps that were killed for memory, killed by hand, or ended with an exit code."""
    assert starved(code) == out_of_memory


def test_steps_that_ran_out_of_memory_are_those_of_elements_or_of_the_only_one() -> None:
    text = "77                  0                   253\n77                  3                   256\n78 N/A 253\n79 N/A 0\n"
    assert parse_steps(text) == {("77", 0), ("78", 0)}


def test_a_step_out_of_memory_speaks_for_a_job_that_failed_and_no_other() -> None:
    lines = [
        line
        for index, state in enumerate(("FAILED", "COMPLETED", "TIMEOUT", "FAILED"))
        for line in (
            f"{NAME}|77_{index}|2026-03-01T12:00:01|{state}|00:00:10|n1|1:0",
            f"batch|77_{index}.batch|2026-03-01T12:00:01|FAILED|00:00:10|n1|1:0",
            f"python|77_{index}.0|2026-03-01T12:00:01|{'FAILED' if index == 3 else 'OUT_OF_MEMORY'}|00:00:10|n1|0:125",
        )
    ]
    wanted = Submission(NAME, "iter-00/a", (0, 1, 2, 3), (), 1, SENT, "77")
    told = parse_sacct("\n".join(lines), {NAME: wanted})[NAME]
    assert [told[index].kind for index in range(4)] == ["out_of_memory", None, "timeout", "killed"]
    assert told[0].detail == "Slurm: FAILED, exit code 1:0; a step of it OUT_OF_MEMORY"


@pytest.mark.parametrize("knows", [True, False])
def test_what_failed_is_asked_about_once_and_where_squeue_cannot_tell_it_has_failed(
    site: Path, tmp_path: Path, knows: bool
) -> None:
    lines = [f"{NAME}|77|2026-03-01T12:00:01|{index}|FAILED|0:10|n1|NonZeroExitCode" for index in (0, 1)]
    steps = "echo '77 0 253'; echo '77 1 256'" if knows else "echo 'Invalid job format specification' >&2; exit 1"
    states = f"printf '%s\\n' {' '.join(repr(line) for line in lines)}"
    stub(site, "squeue", f'case "$*" in *DerivedEC*) echo "$*" >> {tmp_path}/asked; {steps};; *) {states};; esac')
    cluster = SlurmCluster(SlurmConfig())
    for _ in range(2):
        told = cluster.states([KNOWN])[NAME]
        assert [told[0].kind, told[1].kind] == (["out_of_memory", "killed"] if knows else ["killed", "killed"])
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == (1 if knows else 2) and all("--jobs=77 " in each for each in asked)


def test_what_runs_without_steps_is_not_asked_about_them(site: Path, tmp_path: Path) -> None:
    stub(site, "sbatch", "echo Submitted batch job 77")
    stub(site, "squeue", f"echo \"$*\" >> {tmp_path}/asked; echo '{NAME}|77|2026-03-01T12:00:01|0|FAILED|0:10|n1|Nope'")
    graph = chain(2)
    run, cluster = write_run(tmp_path / "run", graph), SlurmCluster(SlurmConfig())
    cluster.submit(run, graph.jobs[KNOWN.job], KNOWN, [])
    assert cluster.states([KNOWN])[NAME][0].kind == "killed"
    assert len((tmp_path / "asked").read_text().splitlines()) == 1


def test_what_was_once_told_of_a_step_stands_when_the_next_question_gets_no_answer(site: Path, tmp_path: Path) -> None:
    line = f"{NAME}|77|2026-03-01T12:00:01|%s|FAILED|0:10|n1|NonZeroExitCode"
    (tmp_path / "states").write_text(line % 0 + "\n")
    (tmp_path / "steps").write_text("77 0 253\n")
    stub(site, "squeue", f'case "$*" in *DerivedEC*) cat {tmp_path}/steps;; *) cat {tmp_path}/states;; esac')
    cluster = SlurmCluster(SlurmConfig())
    assert [state.kind for state in cluster.states([KNOWN])[NAME].values()] == ["out_of_memory"]
    (tmp_path / "states").write_text(f"{line % 0}\n{line % 1}\n")
    (tmp_path / "steps").unlink()
    assert [state.kind for state in cluster.states([KNOWN])[NAME].values()] == ["out_of_memory", "killed"]


def test_all_submissions_are_cancelled_by_one_command_and_nobody_elses(site: Path, tmp_path: Path) -> None:
    lines = [f"{NAME}|77|2026-03-01T12:00:01", f"{NAME}|77|2026-03-01T12:00:01", "aipo-cafe-2|80|2026-03-01T12:00:01"]
    foreign = [f"{NAME}|12|2026-03-01T12:00:01", "else|81|2026-03-01T12:00:01"]
    stub(site, "squeue", f"printf '%s\\n' {' '.join(repr(line) for line in lines + foreign)}")
    stub(site, "scancel", f'echo "$@" >> {tmp_path}/cancelled')
    second = Submission("aipo-cafe-2", "iter-00/b", (0,), (), 1, SENT, None)
    SlurmCluster(SlurmConfig()).cancel([KNOWN, second])
    assert (tmp_path / "cancelled").read_text() == "77 80\n"


# -- what a site forbids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "size"),
    [
        ("MaxArraySize            = 1001", 1001),
        ("MaxArraySize            = 1", 1),
        ("MaxArraySize            = 0", 1),
        ("MaxArraySize            = 1001\nSchedulerParameters     = bf_interval=1,max_array_tasks=100", 100),
        ("ClusterName             = old", 1000),
    ],
)
def test_arrays_are_as_large_as_the_site_allows(site: Path, shown: str, size: int) -> None:
    stub(site, "scontrol", f"echo '{shown}'")
    assert SlurmCluster(SlurmConfig()).limits.max_array_size == size


def test_what_slurm_says_of_the_drivers_own_job_does_not_leak_into_those_it_sends(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaked = tmp_path / "leaked"
    stub(site, "sbatch", f"env | grep ^SLURM > {leaked}; echo Submitted batch job 5")
    for name, value in {
        "SLURM_JOB_ID": "1",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_CONF": "x",
        "SLURM_CLUSTERS": "y",
    }.items():
        monkeypatch.setenv(name, value)
    graph = chain(1)
    single = Submission(NAME, "iter-00/a", (0,), (), 1, SENT, None)
    run = write_run(tmp_path / "run", graph)
    assert SlurmCluster(SlurmConfig()).submit(run, graph.jobs["iter-00/a"], single, []) == "5"
    assert sorted(leaked.read_text().split()) == ["SLURM_CLUSTERS=y", "SLURM_CONF=x"]
    assert os.environ["SLURM_JOB_ID"] == "1"
