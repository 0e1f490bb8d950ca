"""The commands, on a small real run of which a shard failed, and on the same run once that was mended."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from aipo_hpc.__main__ import COMMANDS, main
from aipo_hpc.launch import main as launch_main
from aipo_hpc.record import read_graph
from aipo_hpc.sentinel import Failure
from aipo_hpc.store import Run

SMALL = (
    "recipe=demo", "cluster=inline", "iterations=1", "data.limit=24", "data.num_held_out=6", "generate.n=3",
    "generate.max_tokens=12", "train.num_train_epochs=1", "train.global_batch_size=8",
    "train.per_device_train_batch_size=4", "poll_seconds=0.05", "payload_timeout=0.2",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What a command did."""

    code: int
    out: str
    err: str

    def row(self, job: str) -> list[str]:
        """The line of a job in a table."""
        (line,) = [line for line in self.out.splitlines() if line.split()[:1] == [job]]
        return line.split()


Command = Callable[..., Said]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """A command of ``python -m aipo_hpc``, in this process."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # tyro's way
            code = int(str(ended.code))
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose second shard of rank failed for good: a file lies where its attempts keep their work."""
    run = tmp_path_factory.mktemp("cli") / "broken"
    assert launch_main([*SMALL, f"run_dir={run}", "drive=prepare"]) == 0
    in_the_way(run).touch()
    assert launch_main([*SMALL, f"run_dir={run}"]) == 1
    return run


@pytest.fixture
def failed(broken: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(broken, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(broken: Path) -> Path:
    """The same run, mended and launched again until it was finished."""
    run = Path(shutil.copytree(broken, broken.parent / "finished"))
    in_the_way(run).unlink()
    assert launch_main([*SMALL, f"run_dir={run}"]) == 0
    return run


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def in_the_way(run: Path) -> Path:
    """Where the attempts at the second shard of rank keep their work."""
    return run / "iter-00/rank/shards/00001"


def snapshot(run: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}


# -- a failed run -------------------------------------------------------------------------------------------------------


def test_a_launch_that_cannot_go_on_says_which_shard_why_and_what_to_type(
    failed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch_main([*SMALL, f"run_dir={failed}"]) == 1
    said = capsys.readouterr().err
    assert f"RunFailed: {failed}: cannot go on." in said
    assert "iter-00/rank shard 1: error: NotADirectoryError: " in said
    assert f"python -m aipo_hpc logs {failed} iter-00/rank 1" in said
    assert "Then type the same command again" in said


def test_status_has_a_row_per_job_and_counts_what_failed(failed: Path, command: Command) -> None:
    before = snapshot(failed)
    said = command("status", failed)
    assert said.code == 0
    graph = read_graph(Run(failed))
    assert [said.row(name)[1] for name in graph.jobs] == [str(job.num_shards) for job in graph.jobs.values()]
    assert said.row("iter-00/generate")[:4] == ["iter-00/generate", "2", "2", "18"]
    failures = len(Run(failed).job("iter-00/rank").failures())
    assert said.row("iter-00/rank")[:4] == ["iter-00/rank", "2", "1", str(failures)]
    assert said.row("iter-00/pairs") == ["iter-00/pairs", "1", "0"]
    assert "no driver; the launch command resumes the run" in said.out
    assert snapshot(failed) == before, "a look changed something"


def test_status_tells_which_sentinels_are_not_believed(failed: Path, command: Command) -> None:
    os.truncate(failed / "iter-00/generate/done/00000.json", 100)
    said = command("status", failed)
    assert said.row("iter-00/generate")[2] == "1"
    assert f"{failed}/iter-00/generate/done/00000.json: not believed" in said.out


def test_plan_of_a_run_tells_what_is_done_and_what_would_be_sent_and_why(failed: Path, command: Command) -> None:
    before = snapshot(failed)
    said = command("plan", failed)
    assert said.code == 0
    assert "nothing: done" in " ".join(said.row("iter-00/generate"))
    rank = " ".join(said.row("iter-00/rank"))
    assert "send 1: no sentinel of shard 1 (failed before: error " in rank
    assert "send all 1, after iter-00/rank" in " ".join(said.row("iter-00/pairs"))
    assert f"run directory: {failed}; nothing was submitted" in said.out
    assert snapshot(failed) == before


def test_logs_show_the_failed_shard_with_message_and_traceback(broken: Path, failed: Path, command: Command) -> None:
    for arguments in ((), ("iter-00/rank",), ("iter-00/rank", "1")):
        said = command("logs", failed, *arguments)
        assert said.code == 0
        assert said.out.count("== iter-00/rank shard 1, attempt ") == 1
        assert ": error\nNotADirectoryError: " in said.out and str(in_the_way(broken)) in said.out
        assert "Traceback (most recent call last)" in said.out
    assert command("logs", failed, "iter-00/generate").out == "no shard has failed for good\n"
    assert command("logs", failed, "iter-00/rank", "0").out.startswith("iter-00/rank shard 0: done, attempt ")
    assert command("logs", failed, "iter-00/train", "0").out == "iter-00/train shard 0: no failure recorded\n"


def test_logs_end_with_the_end_of_what_the_task_printed(failed: Path, command: Command) -> None:
    log = failed / "iter-00/rank/logs/7_1_0_log.out"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    Run(failed).job("iter-00/rank").record_failure(
        Failure("iter-00/rank", 1, "later", 9, "killed", "it died", log=str(log), time=2e9)
    )
    said = command("logs", failed, "--lines", "3")
    assert "attempt later" in said.out and "killed\nit died\n" in said.out
    assert said.out.endswith(f"-- end of {log}\nline 97\nline 98\nline 99\n")


@pytest.mark.parametrize("name", ["logs", "reset", "work"])
def test_a_job_that_is_not_in_the_run_is_refused_with_those_that_are(name: str, failed: Path, command: Command) -> None:
    said = command(name, failed, "iter-00/rnak")
    assert said.code == 2
    assert "'iter-00/rnak': no such job in" in said.err and "iter-00/rank, iter-00/pairs" in said.err
    assert "Did you mean 'iter-00/rank'?" in said.err


def test_a_shard_that_a_job_does_not_have_is_refused(failed: Path, command: Command) -> None:
    for name, arguments in (("work", ("--shard", "2")), ("logs", ("2",))):
        said = command(name, failed, "iter-00/rank", *arguments)
        assert (said.code, said.err) == (2, "RunError: iter-00/rank: shard 2 is not among 0 to 1\n")


def test_report_of_an_unfinished_run_says_so(failed: Path, command: Command) -> None:
    said = command("report", failed)
    assert said.code == 0
    assert "no model is finished yet" in said.out
    assert "0 (initial policy)" in said.out


def test_work_that_fails_is_recorded_and_has_exit_code_1(failed: Path, command: Command) -> None:
    before = len(Run(failed).job("iter-00/rank").failures())
    (payload,) = failed.glob("iter-00/generate/shards/00001/*/rows.parquet")
    os.truncate(payload, payload.stat().st_size - 7)
    said = command("work", failed, "iter-00/rank", "--shard", "1")
    assert said.code == 1
    assert said.err.startswith("InputNotVisible: ") and "has the shard computed again" in said.err
    assert len(Run(failed).job("iter-00/rank").failures()) == before + 1


def test_cancel_of_a_run_that_nothing_drives_leaves_it_as_it_was(failed: Path, command: Command) -> None:
    said = command("cancel", failed)
    assert said.code == 0
    assert "no driver; 0 submissions cancelled. The launch command resumes the run" in said.out


def test_what_failed_can_be_reset_with_what_it_needed_and_the_launch_command_finishes(
    failed: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    said = command("reset", failed, "iter-00/generate")
    assert said.code == 0
    assert "iter-00/generate" in said.out and "iter-00/evaluate" in said.out and "iter-00/baseline" not in said.out
    (aside,) = (failed / "set-aside").iterdir()
    assert (aside / "iter-00/generate/done/00000.json").is_file(), "nothing is deleted"
    assert launch_main([*SMALL, f"run_dir={failed}"]) == 0
    assert "final model: " in capsys.readouterr().out


# -- a finished run -----------------------------------------------------------------------------------------------------


def test_only_the_failed_shard_and_what_waited_for_it_ran_when_the_run_was_launched_again(
    broken: Path, whole: Path
) -> None:
    old = [event for event in Run(broken).read_journal() if event["event"] == "submit"]
    new = [event for event in Run(whole).read_journal() if event["event"] == "submit"][len(old) :]
    assert (new[0]["job"], new[0]["shards"]) == ("iter-00/rank", [1])
    assert {event["job"] for event in new}.isdisjoint({"iter-00/generate", "iter-00/baseline"})


def test_a_finished_run_submits_nothing_more(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [event for event in Run(finished).read_journal() if event["event"] == "submit"]
    assert launch_main([*SMALL, f"run_dir={finished}"]) == 0
    assert [event for event in Run(finished).read_journal() if event["event"] == "submit"] == before
    assert "win rate" in capsys.readouterr().out


def test_report_of_a_finished_run_names_results_and_the_final_model(finished: Path, command: Command) -> None:
    said = command("report", finished)
    assert said.code == 0
    assert "win rate vs iteration 0" in said.out and "1 (iter-00)" in said.out and "pairs kept" in said.out
    model = Path(said.out.split("final model: ")[1].strip())
    assert (model / "config.json").is_file() and (model / "model.safetensors").is_file()


def test_plan_and_logs_of_a_finished_run_have_nothing_to_tell(finished: Path, command: Command) -> None:
    said = command("plan", finished)
    assert all("nothing: done" in " ".join(said.row(job)) for job in read_graph(Run(finished)).jobs)
    assert command("logs", finished).out == "no shard has failed for good\n"


def test_plan_with_the_recipe_names_the_fields_that_drifted(finished: Path, command: Command) -> None:
    said = command("plan", *SMALL, f"run_dir={finished}", "train.beta=0.3")
    assert said.code == 0
    assert "REFUSED, settings differ: settings.beta: 0.1 -> 0.3" in " ".join(said.row("iter-00/train"))
    assert "REFUSED" not in " ".join(said.row("iter-00/reference"))


def test_reset_sets_a_job_and_what_depends_on_it_aside_and_no_more(finished: Path, command: Command) -> None:
    said = command("reset", finished, "iter-00/train")
    assert said.code == 0
    assert "moved 3 jobs (3 finished shards" in said.out
    assert not (finished / "iter-00/train").exists() and (finished / "iter-00/reference").is_dir()
    shown = command("status", finished)
    assert shown.code == 0 and "iter-00/reference" in shown.out


def test_work_on_a_finished_shard_does_nothing(finished: Path, command: Command) -> None:
    before = snapshot(finished)
    said = command("work", finished, "iter-00/rank", "--shard", "1")
    assert (said.code, said.out) == (0, "iter-00/rank shard 1: is done already\n")
    assert snapshot(finished) == before


# -- the command line itself --------------------------------------------------------------------------------------------


def test_without_a_command_all_are_listed(command: Command) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        said = command(*arguments)
        assert said.code == 0
        assert [line.split()[0] for line in said.out.splitlines() if line.startswith("  ")] == [
            "launch",
            "plan",
            "doctor",
            *COMMANDS,
        ]


def test_an_unknown_command_gets_a_suggestion_and_exit_code_2(command: Command) -> None:
    said = command("statu", "runs/demo")
    assert said.code == 2
    assert said.err.startswith("'statu' is not a command. Did you mean 'status'?\n")


@pytest.mark.parametrize("name", ["plan", *COMMANDS])
def test_a_folder_that_is_no_run_is_refused(name: str, command: Command, tmp_path: Path) -> None:
    more = ["iter-00/rank"] if name in ("reset", "work") else []
    for path in (tmp_path, tmp_path / "absent", Path(__file__)):
        said = command(name, path, *more)
        assert said.code == 2, said
        assert said.err.startswith(f"RunError: {path}: not a run directory (no recipe.json in it). Give the folder of")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_explains_its_arguments(name: str, command: Command) -> None:
    said = command(name, "--help")
    assert said.code == 0
    assert f"python -m aipo_hpc {name}" in said.out and "run directory" in said.out.lower()
    assert command(name).code == 2, "a run directory is needed"


def test_plan_of_a_recipe_writes_nothing(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("plan", "recipe=ultrafeedback", "generate.num_shards=40")
    assert said.code == 0
    assert said.row("iter-02/generate")[1] == "40"
    assert "2 nodes, 8 tasks/node, 8 GPU/node" in " ".join(said.row("iter-00/train"))
    assert "runs/ultrafeedback (not there yet); nothing was submitted" in said.out
    assert list(tmp_path.iterdir()) == []


def test_launch_is_a_command_too(command: Command, tmp_path: Path) -> None:
    said = command("launch", *SMALL, f"run_dir={tmp_path / 'run'}", "drive=prepare")
    assert said.code == 0 and (tmp_path / "run/recipe.json").is_file()


def test_a_reader_that_leaves_early_is_no_error(finished: Path) -> None:
    shell = f"{sys.executable} -m aipo_hpc plan recipe=ultrafeedback | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


HEAVY = ("torch", "transformers", "pyarrow", "datasets", "vllm", "deepspeed", "accelerate", "numpy", "huggingface_hub")


@pytest.mark.parametrize("name", ["plan-recipe", "plan", "status", "logs", "report", "help"])
def test_looking_imports_no_machine_learning_library(name: str, whole: Path) -> None:
    arguments = {"plan-recipe": ["plan", "recipe=ultrafeedback"], "help": ["launch", "recipe=demo", "--help"]}
    code = (
        "import sys, json\nfrom aipo_hpc.__main__ import main\n"
        f"try:\n    main({arguments.get(name, [name, str(whole)])!r})\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "aipo_hpc" in loaded
    assert loaded.isdisjoint(HEAVY)
