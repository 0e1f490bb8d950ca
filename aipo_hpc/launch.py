"""Start a run, or resume it: ``python -m aipo_hpc.launch recipe=ultrafeedback [field=value ...]``.

Everything that can be checked is checked before anything is submitted; then the run directory is written, prompts are read,
and the driver takes over. Typed again, the same command goes on where the run stands.
"""

import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from aipo_hpc import settings
from aipo_hpc.arguments import parse_recipe
from aipo_hpc.chain import Chain, make_steps
from aipo_hpc.clusters import Cluster, make_cluster
from aipo_hpc.drift import refuse_drift
from aipo_hpc.driver import Cancelled, Driver, Tell
from aipo_hpc.errors import AipoError, ClusterError, RunError, UserError
from aipo_hpc.graph import Graph, build_graph
from aipo_hpc.here import run_here
from aipo_hpc.journal import Journal
from aipo_hpc.lease import EXPIRES_SECONDS, Lease
from aipo_hpc.parity import check_parity
from aipo_hpc.preflight import resolve, with_templates
from aipo_hpc.recipe import Recipe, validate
from aipo_hpc.record import job_record, read_graph
from aipo_hpc.report import print_report
from aipo_hpc.store import Run
from aipo_hpc.terminal import Screen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 finished, 1 the run failed, 2 the user has to mend something."""
    try:
        launch(parse_recipe(sys.argv[1:] if arguments is None else arguments, "python -m aipo_hpc.launch"))
    except AipoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except Cancelled:
        print("cancelled; what is done stays done, the same command resumes", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(
            "driver stopped; jobs that were sent go on by themselves on Slurm. The same command takes them up again; "
            "`python -m aipo_hpc cancel <run>` stops them.",
            file=sys.stderr,
        )
        return 130
    return 0


def launch(recipe: Recipe, cluster: Cluster | None = None) -> Run:
    """Check, prepare and drive a run until it is finished (or as ``recipe.drive`` says); returns the run."""
    validate(recipe)
    run = Run(recipe.folder())
    graph = resolve(build_graph(recipe))
    started = run.exists()
    run_id = check_run(run, recipe, graph)
    if cluster is None and recipe.drive != "prepare":
        cluster = make_cluster(recipe)
    if cluster is not None:
        cluster.check(graph)
    run.create()
    graph = with_templates(graph, run)
    if not started:  # what a started run is made of cannot have changed
        check_parity(graph)
    screen = Screen(graph, run)
    with Lease(run) as lease:
        run.write_recipe({"run_id": run_id, "recipe": recipe.name, "settings": settings.everything(recipe)})
        journal = Journal(run)
        if recipe.drive == "once" and journal.launched:
            journal.step()  # cron's, not the user's: what was given up stays so
        else:
            journal.launch(cluster=recipe.cluster, drive=recipe.drive)
        for job in graph.jobs.values():
            run.job(job.name).create(job_record(graph, job, recipe.payload_timeout))
        # Here and now, so that what is wrong with the prompts is told before anything is submitted.
        run_here(run, graph, journal, screen.tell)
        if cluster is None:
            screen.tell(f"prepared {run.path}; nothing was submitted")
            return run
        driver = Driver(run, run_id, graph, cluster, journal, lease, screen.tell, screen.show, recipe.keep_models)
        with screen:
            if recipe.drive == "once":
                if not driver.follow(recipe.poll_seconds, stay=driver.settling):
                    return run
            elif recipe.drive == "chain":
                steps = make_steps(recipe, cluster, run_id)
                if not Chain(run, recipe, steps, driver, journal, screen.tell, None).advance():
                    return run
            else:
                driver.follow(recipe.poll_seconds)
    print_report(run, graph)
    return run


def step(run_dir: Path, own_id: str | None) -> None:
    """One step, in the job ``own_id``: what a launch does, with the graph and recipe that it left in the run directory."""
    run = Run(run_dir)
    written = run.read_recipe()
    recipe = settings.from_plain(Recipe, written["settings"])
    graph = read_graph(run)
    screen = Screen(graph, run)
    if recipe.drive != "chain":
        screen.tell(f"{run.path} is not driven by a chain any more (drive={recipe.drive}); this one ends here")
        return
    cluster = patiently(lambda: make_cluster(recipe), screen.tell)
    with Lease(run, patience=1.5 * EXPIRES_SECONDS) as lease:
        journal = Journal(run)
        journal.step()
        driver = Driver(
            run, written["run_id"], graph, cluster, journal, lease, screen.tell, screen.show, recipe.keep_models
        )
        steps = make_steps(recipe, cluster, written["run_id"])
        if not Chain(run, recipe, steps, driver, journal, screen.tell, own_id).advance():
            return
    print_report(run, graph)


def patiently(make: Callable[[], Cluster], tell: Tell) -> Cluster:
    """The cluster, as soon as its scheduler answers: a step that gave up would end the chain."""
    while True:
        try:
            return make()
        except ClusterError as error:
            tell(f"scheduler does not answer, waiting: {error}")
            time.sleep(10.0)


def check_run(run: Run, recipe: Recipe, graph: Graph) -> str:
    """Make sure that the run directory is this recipe's and its settings are the same; returns the run's id."""
    if not run.exists():
        return uuid.uuid4().hex[:8]
    written = run.read_recipe()
    if written["recipe"] != recipe.name:
        raise RunError(
            f"{run.path}: is a run of recipe {written['recipe']!r}, not of {recipe.name!r}. "
            "Give this one a place of its own with run_dir=..."
        )
    refuse_drift(run, graph)
    return str(written["run_id"])


if __name__ == "__main__":
    sys.exit(main())
