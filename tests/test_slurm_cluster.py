"""Slurm as a cluster: what sbatch is told, what its words mean, and the same on a real one."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import TouchConfig, chain, child_environment, eventually, write_run
from sandbox import Sandbox

from aipo_hpc.clusters import Dependency, Submission, TaskState
from aipo_hpc.clusters.slurm import SlurmCluster, dependency
from aipo_hpc.clusters.slurm_answers import expand, parse_sacct, parse_squeue, task_state
from aipo_hpc.errors import ClusterError, SubmitRefused
from aipo_hpc.graph import Graph, Job
from aipo_hpc.launch import launch
from aipo_hpc.recipe import Recipe, SlurmConfig
from aipo_hpc.resources import Resources
from aipo_hpc.store import Run

A = "iter-00/a"
NAME = "aipo-cafe-7"
ARRAY = Submission(NAME, A, (4, 5, 9), (), 1, 0.0, "77")
WAITING = replace(ARRAY, after=(Dependency("aipo-cafe-6", "aftercorr"),))


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("COMPLETED", None), ("FAILED", "killed"), ("TIMEOUT", "timeout"), ("DEADLINE", "timeout"),
        ("OUT_OF_MEMORY", "out_of_memory"), ("NODE_FAIL", "node_failure"), ("BOOT_FAIL", "node_failure"),
        ("PREEMPTED", "preempted"), ("CANCELLED", "cancelled"), ("CANCELLED by 1000", "cancelled"),
        ("CANCELLED+", "cancelled"), ("REVOKED", "cancelled"),
    ],
)  # fmt: skip
def test_words_for_what_is_over_are_classes_of_failure(word: str, kind: str | None) -> None:
    state = task_state(word, 62, ARRAY, "exit code 1:0", "n1")
    assert state == TaskState(alive=False, kind=kind, detail=f"Slurm: {word}, exit code 1:0", node="n1", seconds=62)


@pytest.mark.parametrize(
    "word",
    ["PENDING", "CONFIGURING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "STAGE_OUT", "RESIZING",
     "SIGNALING", "RESV_DEL_HOLD", "UNKNOWN", "SOMETHING_NEW", ""],
)  # fmt: skip
def test_any_other_word_means_neither_success_nor_failure(word: str) -> None:
    assert task_state(word, 62, ARRAY, "", "n1") == TaskState(alive=True, running=False, node="n1", seconds=62)


@pytest.mark.parametrize("word", ["RUNNING", "COMPLETING"])
def test_what_runs_is_told_from_what_waits(word: str) -> None:
    assert task_state(word, 62, ARRAY, "", "n1") == TaskState(alive=True, running=True, node="n1", seconds=62)


def test_what_is_cancelled_before_it_ran_because_its_input_failed_is_no_failure_of_its_own() -> None:
    assert task_state("CANCELLED", 0, WAITING, "", "").kind == "dependency"
    assert task_state("CANCELLED", 9, WAITING, "", "n1").kind == "cancelled", "it ran: somebody cancelled it"
    assert task_state("CANCELLED", 0, ARRAY, "", "").kind == "cancelled", "it waited for nothing"
    behind = replace(ARRAY, after=(Dependency("aipo-cafe-6", "afterany", (1,)),))
    assert task_state("CANCELLED", 0, behind, "", "").kind == "cancelled", "that another ends is never in vain"


@pytest.mark.parametrize(
    ("wanted", "shards", "told"),
    [
        (Dependency("x", "afterok"), (4, 5, 9), "afterok:76"),
        (Dependency("x", "afterok", (0, 2)), (4, 5, 9), "afterok:76_0:76_2"),
        (Dependency("x", "afterany", (0,)), (4,), "afterany:76"),
    ],
)
def test_a_dependency_names_a_job_or_elements_of_an_array(
    wanted: Dependency, shards: tuple[int, ...], told: str
) -> None:
    assert dependency(wanted, Submission("x", "iter-00/x", shards, (), 1, 0.0, "76")) == told


@pytest.mark.parametrize(
    ("folded", "indices"),
    [("[3-5,8%2]", [3, 4, 5, 8]), ("[1-7:3]", [1, 4, 7]), ("[0]", [0]), ("12", [12]), ("[0,2-3]", [0, 2, 3]),
     ("[7,9-...]", [7]), ("[0-1001%256]", list(range(1002))), ("", [])],
)  # fmt: skip
def test_folded_array_ids_are_unfolded(folded: str, indices: list[int]) -> None:
    assert expand(folded) == indices


def test_lines_of_squeue_become_states_of_elements() -> None:
    text = (
        f"{NAME}|77|2026-03-01T12:00:01|0|RUNNING|1:02|n1|None\n"
        f"{NAME}|77|2026-03-01T12:00:01|1|PENDING|0:00|n1|Dependency\n"
        f"{NAME}|77|2026-03-01T12:00:01|2|FAILED|0:09|n1|NonZeroExitCode\n"
        "somebody|78|2026-03-01T12:00:01|N/A|RUNNING|9:00|n1|None\n"
        "a broken line\n\n"
    )
    assert parse_squeue(text, {NAME: ARRAY}) == {
        NAME: {
            0: TaskState(alive=True, running=True, node="n1", seconds=62),
            1: TaskState(alive=True, node="n1", seconds=0),
            2: TaskState(alive=False, kind="killed", detail="Slurm: FAILED, NonZeroExitCode", node="n1", seconds=9),
        }
    }


def test_a_job_that_is_no_array_is_element_0() -> None:
    wanted = {NAME: replace(ARRAY, shards=(5,))}
    assert list(parse_squeue(f"{NAME}|77|2026-03-01T12:00:01|N/A|RUNNING|1:02|n1|None\n", wanted)[NAME]) == [0]
    assert list(parse_sacct(f"{NAME}|77|2026-03-01T12:00:01|FAILED|00:01:00|n1|1:0\n", wanted)[NAME]) == [0]


@pytest.mark.parametrize("first", [True, False])
def test_an_array_that_was_cancelled_as_a_whole_is_told_by_one_line_for_what_has_none_of_its_own(first: bool) -> None:
    whole = f"{NAME}|77|2026-03-01T12:00:01|N/A|CANCELLED|0:00|n1|None\n"
    own = f"{NAME}|77|2026-03-01T12:00:01|1|COMPLETED|0:09|n1|None\n"
    told = parse_squeue(own + whole if first else own, {NAME: ARRAY})[NAME]
    assert {index: state.kind for index, state in told.items()} == (
        {0: "cancelled", 1: None, 2: "cancelled"} if first else {1: None}
    )
    told = parse_sacct(f"{NAME}|77|2026-03-01T12:00:01|CANCELLED by 0|00:00:00|n1|0:0\n", {NAME: WAITING})[NAME]
    assert [state.kind for state in told.values()] == ["dependency"] * 3


def test_lines_of_sacct_become_states_of_elements() -> None:
    text = (
        f"{NAME}|77_0|2026-03-01T12:00:01|COMPLETED|00:01:00|n1|0:0\n"
        f"{NAME}|77_[1-2%1]|2026-03-01T12:00:01|PENDING|00:00:00|n1|0:0\n"
        "somebody|78|2026-03-01T12:00:01|COMPLETED|00:01:00|n1|0:0\n"
        "short|line\n"
    )
    waits = TaskState(alive=True, node="n1", seconds=0)
    done = TaskState(alive=False, kind=None, detail="Slurm: COMPLETED, exit code 0:0", node="n1", seconds=60)
    assert parse_sacct(text, {NAME: ARRAY}) == {NAME: {0: done, 1: waits, 2: waits}}


# -- a real one ------------------------------------------------------------------------------------------------------


class Site:
    """A run whose jobs are sent to the sandbox."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self.sandbox, self.hold = sandbox, folder / "hold"
        config = TouchConfig(hold=str(self.hold), resources=Resources(time=5))
        self.graph: Graph = chain(3, config)
        self.run: Run = write_run(folder / "run", self.graph, payload_timeout=30.0)
        self.cluster = SlurmCluster(SlurmConfig())
        self.sent: list[Submission] = []
        self.label = f"aipo-{time.time_ns() % 10**9}"

    def send(
        self, shards: tuple[int, ...], job: str = A, after: Submission | None = None, how: str = "aftercorr", *at: int
    ) -> Submission:
        waits = () if after is None else (Dependency(after.name, how, at),)
        made = Submission(f"{self.label}-{len(self.sent) + 1}", job, shards, waits, 1, time.time())
        identifier = self.cluster.submit(self.run, self.graph.jobs[job], made, () if after is None else (after,))
        self.sent.append(replace(made, id=identifier))
        return self.sent[-1]

    def states(self, submission: Submission) -> dict[int, TaskState]:
        return dict(self.cluster.states([submission]).get(submission.name, {}))

    def over(self, submission: Submission) -> bool:
        states = self.states(submission)
        return len(states) == len(submission.shards) and not any(state.alive for state in states.values())

    def done(self, job: str = A) -> set[int]:
        return set(self.run.job(job).done(self.graph.fingerprints[job]))


@pytest.fixture
def site(slurm_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name, value in {**slurm_sandbox.env, **child_environment(tmp_path / "site")}.items():
        monkeypatch.setenv(name, value)
    made = Site(slurm_sandbox, tmp_path)
    yield made
    made.cluster.cancel(made.sent)
    assert eventually(lambda: all(made.over(submission) for submission in made.sent), 60)


def parameters(resources: Resources, submission: Submission, *after: Submission, **config: object) -> dict[str, object]:
    cluster = SlurmCluster.__new__(SlurmCluster)  # without asking a Slurm
    cluster._config = SlurmConfig(**config)  # type: ignore[arg-type]
    job = Job(A, "touch", 0, 3, 7, TouchConfig(), {}, resources)
    return cluster._parameters(job, submission, after)


def test_what_sbatch_is_told_of_a_plain_shard() -> None:
    assert parameters(Resources(time=30), ARRAY) == {
        "job_name": NAME, "comment": "aipo-cafe iter-00/a", "nodes": 1, "ntasks_per_node": 1, "cpus_per_task": 1,
        "time": 30, "use_srun": False, "srun_args": [], "array_parallelism": 256, "stderr_to_stdout": True,
        "signal_delay_s": 120, "additional_parameters": {"signal": "B:USR2@120"},
    }  # fmt: skip


def test_what_sbatch_is_told_of_a_gang_at_a_particular_site_after_another_job() -> None:
    resources = Resources(
        nodes=2, tasks_per_node=8, gpus_per_node=8, cpus_per_task=4, mem_gb=1.5, time=60, partition="big"
    )
    before = Submission("aipo-cafe-6", "iter-00/x", (4, 5, 9), (), 1, 0.0, "76")
    told = parameters(
        resources, WAITING, before, account="me", partition="gpu", qos="high", constraint="h100", exclude="n[1-2]",
        setup=("module load cuda",), srun_args=("--container-image=x",), sbatch_args={"reservation": "r"},
    )  # fmt: skip
    assert told == {
        "job_name": NAME, "comment": "aipo-cafe iter-00/a", "nodes": 2, "ntasks_per_node": 8, "cpus_per_task": 4,
        "gpus_per_node": 8, "mem": "1536MB", "time": 60, "partition": "big", "account": "me", "qos": "high",
        "constraint": "h100", "exclude": "n[1-2]", "setup": ["module load cuda"],
        "use_srun": True, "srun_args": ["--container-image=x", "--kill-on-bad-exit=1", "--cpus-per-task=4"],
        "signal_delay_s": 120, "array_parallelism": 256, "stderr_to_stdout": True,
        "additional_parameters": {"reservation": "r", "dependency": "aftercorr:76", "kill-on-invalid-dep": "yes"},
    }  # fmt: skip


def test_a_mistyped_partition_is_refused_with_sbatchs_words_before_anything_is_written_or_submitted(
    slurm_sandbox: Sandbox, small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm_sandbox.env["SLURM_CONF"])
    before = slurm_sandbox.run("squeue", "--noheader", "--states=all", "--format=%i")
    recipe = replace(small_recipe, cluster="slurm", slurm=SlurmConfig(partition="gpuu"))
    with pytest.raises(SubmitRefused) as refused:
        launch(recipe)
    print(refused.value)
    assert "invalid partition specified: gpuu" in str(refused.value), "sbatch's own words"
    assert "iter-00/baseline" in str(refused.value) and "slurm.* fields; `sinfo` lists the partitions" in str(
        refused.value
    )
    assert not recipe.folder().exists()
    assert slurm_sandbox.run("squeue", "--noheader", "--states=all", "--format=%i") == before


def test_an_array_runs_with_one_sbatch_and_each_look_is_one_squeue(site: Site) -> None:
    site.hold.touch()
    commands = site.cluster.num_commands
    array = site.send((0, 1, 2))
    assert site.cluster.num_commands == commands + 1
    assert eventually(lambda: [state.running for state in site.states(array).values()] == [True] * 3, 60)
    before, looks = site.cluster.num_commands, 3
    for _ in range(looks):
        site.states(array)
    assert site.cluster.num_commands == before + looks
    site.hold.unlink()
    assert eventually(lambda: site.done() == {0, 1, 2}, 60)
    assert eventually(lambda: site.over(array), 60)
    assert {state.kind for state in site.states(array).values()} == {None}
    (made, *_) = site.run.job(A).done(site.graph.fingerprints[A]).values()
    assert made.scheduler["slurm_array_job_id"] == array.id and site.run.job(A).logs_of(made)


def test_a_shard_starts_when_its_own_input_is_done(site: Site) -> None:
    source = site.send((0, 1, 2))
    reader = site.send((0, 1, 2), "iter-00/b", source)
    assert eventually(lambda: site.done("iter-00/b") == {0, 1, 2}, 90)
    assert eventually(lambda: site.over(reader), 60)


def test_what_is_sent_behind_an_element_of_an_array_waits_for_that_one_alone(site: Site) -> None:
    site.hold.touch()
    array = site.send((0, 1, 2))
    behind = site.send((1,), A, array, "afterany", 1)
    needs = site.send((0,), A, array, "afterok", 0, 2)
    assert eventually(lambda: all(state.running for state in site.states(array).values()), 60)
    time.sleep(2)
    assert [state.running for state in site.states(behind).values()] == [False], "it waits"
    site.sandbox.run("scancel", f"{array.id}_1")
    assert eventually(lambda: [state.running for state in site.states(behind).values()] == [True], 60)
    assert [site.states(array)[index].running for index in (0, 2)] == [True, True], "the others went on"
    site.hold.unlink()
    assert eventually(lambda: site.over(needs) and site.over(behind), 60)
    assert [state.kind for each in (behind, needs) for state in site.states(each).values()] == [None, None]


def test_a_submission_whose_answer_was_lost_is_found_by_its_name(site: Site) -> None:
    site.hold.touch()
    array = site.send((0, 1))
    assert all(state.alive for state in site.states(replace(array, id=None)).values())
    assert len(site.states(replace(array, id=None))) == 2


def test_a_job_that_got_the_id_of_ours_is_not_believed(site: Site) -> None:
    """Ids are used again: what Slurm says of the id of somebody else's job says nothing of ours."""
    other = site.send((0,))
    assert eventually(lambda: site.over(other), 60)
    ours = replace(other, name=f"{site.label}-999")
    assert site.states(ours) == {}, "neither done nor failed"


def test_an_array_that_is_cancelled_before_it_began_is_told_over_in_all_elements(site: Site) -> None:
    site.hold.touch()
    array = site.send((0, 1, 2))
    site.cluster.cancel([array])
    assert eventually(lambda: site.over(array), 60), site.states(array)
    assert {state.kind for state in site.states(array).values()} == {"cancelled"}


def test_cancel_ends_all_that_it_names_and_nothing_else(site: Site) -> None:
    site.hold.touch()
    one, two, three = site.send((0,)), site.send((1, 2)), site.send((0, 1))

    def running() -> bool:
        return all(state.running for each in (one, two, three) for state in site.states(each).values())

    assert eventually(running, 60)
    site.cluster.cancel([one, replace(two, id=None)])
    assert eventually(lambda: site.over(one) and site.over(two), 60)
    assert {state.kind for each in (one, two) for state in site.states(each).values()} == {"cancelled"}
    assert [state.alive for state in site.states(three).values()] == [True, True]
    site.cluster.cancel([one])


def test_a_machine_without_slurm_is_told_what_to_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"scontrol: not found\. .* use cluster=local"):
        SlurmCluster(SlurmConfig())
