"""Look at runs and steer them: ``python -m aipo_hpc plan|doctor|status|logs|report|cancel|reset|work``."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from aipo_hpc.errors import AipoError, ClusterError, UserError
from aipo_hpc.graph import build_graph
from aipo_hpc.record import check_job, check_shard, read_graph
from aipo_hpc.store import Run

if TYPE_CHECKING:
    from aipo_hpc.recipe import Recipe

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="a run directory, e.g. runs/demo")]


def plan(arguments: Sequence[str]) -> None:
    """Print the graph of a run directory or of a recipe: jobs, shards, resources, what is done, what would run and why."""
    from aipo_hpc.arguments import parse_recipe
    from aipo_hpc.plan import plan_table
    from aipo_hpc.recipe import validate
    from aipo_hpc.terminal import print_table

    if _is_run(arguments):
        run = Run(Path(arguments[0]))
        graph = read_graph(run)
    else:
        recipe = parse_recipe(arguments, "python -m aipo_hpc plan")
        validate(recipe)
        run, graph = Run(recipe.folder()), build_graph(recipe)
    print_table(plan_table(graph, run))
    print(f"\nrun directory: {run.path}{'' if run.exists() else ' (not there yet)'}; nothing was submitted")


def doctor(arguments: Sequence[str]) -> int:
    """Check what a run directory or a recipe needs of this machine: Slurm, the folder, packages, models; 1 for a problem."""
    from aipo_hpc.doctor import examine, findings_table
    from aipo_hpc.terminal import print_table

    findings = examine(*_recipe_of(arguments, "doctor"))
    print_table(findings_table(findings))
    return int(any(finding.state == "problem" for finding in findings))


def _is_run(arguments: Sequence[str]) -> bool:
    """Whether a command line names a run directory, not a recipe."""
    return len(arguments) == 1 and "=" not in arguments[0] and not arguments[0].startswith("-")


def _recipe_of(arguments: Sequence[str], command: str) -> "tuple[Recipe, Path]":
    """The recipe of a run directory, or the one that is named, and the run's folder."""
    from aipo_hpc.arguments import parse_recipe
    from aipo_hpc.recipe import Recipe
    from aipo_hpc.settings import from_plain

    if _is_run(arguments):
        run = Run(Path(arguments[0]))
        return from_plain(Recipe, run.read_recipe()["settings"]), run.path
    recipe = parse_recipe(arguments, f"python -m aipo_hpc {command}")
    return recipe, Run(recipe.folder()).path


def status(run: Folder) -> None:
    """Print one row per job of a run: shards, done, running, failed attempts, rows, seconds; and who drives it."""
    from aipo_hpc.cancel import living_shards, steps_of
    from aipo_hpc.lease import is_alive, read_owner
    from aipo_hpc.terminal import job_table, print_table

    opened = Run(Path(run))
    graph = read_graph(opened)
    try:
        alive = living_shards(opened, graph)
        steps = steps_of(opened)
        waiting = steps.living() if steps is not None else []
    except ClusterError as error:
        alive, waiting = {}, []
        print(f"running and waiting shards are not known, the scheduler does not answer: {error}", file=sys.stderr)
    print_table(job_table(graph, opened, alive))
    owner = read_owner(opened)
    if owner is not None and is_alive(owner):
        age = time.time() - owner["heartbeat"]
        print(f"\ndriven by process {owner['pid']} on {owner['host']}, last sign of life {age:.0f} s ago")
    elif waiting:
        print(f"\ndriven by a chain; its next step is job {waiting[0].id} ({waiting[0].what})")
    else:
        print("\nno driver; the launch command resumes the run")
    for name in graph.jobs:
        for report in opened.job(name).reports:
            print(report)


def logs(run: Folder, job: Annotated[str, tyro.conf.Positional] = "", shard: Annotated[int, tyro.conf.Positional] = -1,
         lines: int = 40) -> None:  # fmt: skip
    """Print the last failure of each failed shard, of a job, or of one shard, with the tail of its log.

    Args:
        run: a run directory.
        job: a job, e.g. iter-00/generate (default: all).
        shard: a shard's number (default: all that failed).
        lines: lines of the log's end to print.
    """
    opened = Run(Path(run))
    graph = read_graph(opened)
    if job:
        check_job(graph, job, opened)
        if shard != -1:
            check_shard(graph, job, shard)
    shown = 0
    for name in [job] if job else graph.jobs:
        done = opened.job(name).done(graph.fingerprints[name])
        # A shard's own failures say more of it than those of extra tasks.
        failures = sorted(opened.job(name).failures(), key=lambda failure: not failure.extra)
        latest = {failure.shard: failure for failure in failures}
        for number, failure in sorted(latest.items()):
            if shard not in (-1, number) or (number in done and shard == -1):
                continue
            shown += 1
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(failure.time))
            attempt = f"{'extra ' if failure.extra else ''}attempt {failure.attempt}"
            print(f"== {name} shard {number}, {attempt} on {failure.host}, {when}: {failure.kind}")
            print(failure.message)
            print(failure.traceback.rstrip())
            print_tail(failure.log, lines)
    if shard != -1 and not shown and job:
        sentinel = opened.job(job).done(graph.fingerprints[job]).get(shard)
        print(f"{job} shard {shard}: " + (f"done, attempt {sentinel.attempt}" if sentinel else "no failure recorded"))
        for log in opened.job(job).logs_of(sentinel) if sentinel else []:
            print_tail(str(log), lines)
    elif not shown:
        print("no shard has failed for good")


def print_tail(log: str, lines: int) -> None:
    """Print the end of a log file, if it is there."""
    if log and Path(log).is_file():
        print(f"-- end of {log}")
        print("\n".join(Path(log).read_text(errors="replace").splitlines()[-lines:]))


def report(run: Folder, summary: bool = False, results: tuple[str, ...] = (), manifest: bool = False) -> None:
    """Print what a run achieved: win rates, lengths, pairs, times, and where the final model lies.

    Args:
        run: a run directory.
        summary: print one table over the iterations instead, and write it with plots below report/ in the run.
        results: result files of benchmarks' own tools, or folders of them; their scores go into that table.
        manifest: print instead the chain from the newest model back to the prompts and models it was made from, and write
            the manifests of all iterations again.
    """
    from aipo_hpc.report import print_lineage, print_report, print_summary

    opened = Run(Path(run))
    graph = read_graph(opened)
    if summary or results:
        print_summary(opened, graph, [Path(path).expanduser() for path in results], write=summary)
    if manifest:
        print_lineage(opened, graph)
    if not (summary or results or manifest):
        print_report(opened, graph)


def cancel(run: Folder) -> None:
    """Stop a run's driver and all its waiting and running jobs; what is done stays done, and the run can be resumed."""
    from aipo_hpc.cancel import cancel_run

    print(cancel_run(Run(Path(run))))


def reset(run: Folder, job: Annotated[str, tyro.conf.Positional]) -> None:
    """Set a job and all that depends on it aside (nothing is deleted), so that the next launch computes it anew.

    Args:
        run: a run directory.
        job: the job, e.g. iter-01/rank.
    """
    from aipo_hpc.cancel import reset_job

    print(reset_job(Run(Path(run)), job))


def work(run: Folder, job: Annotated[str, tyro.conf.Positional], shard: int = 0) -> None:
    """Do one shard of a job here and now: what a task on the cluster does, for launching by hand (after drive=prepare).

    Args:
        run: a run directory.
        job: the job, e.g. iter-00/generate.
        shard: the shard's number.
    """
    from aipo_hpc.worker import Envelope

    opened = Run(Path(run))
    graph = read_graph(opened)
    check_job(graph, job, opened)
    check_shard(graph, job, shard)
    by_hand = f"hand-{os.environ.get('SLURM_JOB_ID') or os.getpid()}"
    Envelope(str(opened.path), job, shard, by_hand, shard, 0).run()


COMMANDS: dict[str, Callable[..., None]] = {
    "status": status,
    "logs": logs,
    "report": report,
    "cancel": cancel,
    "reset": reset,
    "work": work,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 for a failure, 2 when the user has to mend something."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0] == "plan":
            plan(given[1:])
        elif given and given[0] == "doctor":
            return doctor(given[1:])
        elif given and given[0] == "launch":
            from aipo_hpc import launch

            return launch.main(given[1:])
        elif given and given[0] in COMMANDS:
            command = COMMANDS[given[0]]
            tyro.cli(command, args=given[1:], prog=f"python -m aipo_hpc {given[0]}", use_underscores=True)
        elif given in ([], ["--help"], ["-h"]):
            print_usage()
        else:
            close = get_close_matches(given[0], ["launch", "plan", "doctor", *COMMANDS], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            print(f"{given[0]!r} is not a command.{hint}", file=sys.stderr)
            print_usage()
            return 2
        sys.stdout.flush()
    except AipoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:
        # The reader has seen enough, as in `... | head`. What is left goes nowhere, also what Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def print_usage() -> None:
    """One line per command."""
    print("usage: python -m aipo_hpc COMMAND ...\n")
    commands = {"launch": None, "plan": plan, "doctor": doctor, **COMMANDS}
    for name, command in commands.items():
        what = "Start a run, or resume it: recipe=NAME [field=value ...]" if command is None else command.__doc__ or ""
        print(f"  {name:7} {what.splitlines()[0]}")
    print("\n`COMMAND --help` tells the arguments of each.")


if __name__ == "__main__":
    sys.exit(main())
