"""The driver: looks at files and scheduler, has `reconcile` decide, and does what it says, until the run is finished.

It holds nothing that is not on disk or with the scheduler, except since when it has seen an element over: kill it anywhere
and start it again.
"""

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path

from aipo_hpc.adjustment import AS_ASKED, Adjustment
from aipo_hpc.allowance import Allowance
from aipo_hpc.clusters import Cluster, Submission, TaskState
from aipo_hpc.damage import Inspector
from aipo_hpc.decision import Decision, Element, RecordFailure, Submit, View, heard_over
from aipo_hpc.errors import ClusterError, NoRoom, RunFailed, SubmitRefused
from aipo_hpc.explain import explain
from aipo_hpc.graph import Graph
from aipo_hpc.here import run_here
from aipo_hpc.journal import Journal
from aipo_hpc.lease import Lease
from aipo_hpc.living import LOST_AFTER
from aipo_hpc.manifest import Manifests
from aipo_hpc.reconcile import reconcile
from aipo_hpc.retention import Retention
from aipo_hpc.sentinel import BY_DRIVER, Failure, Sentinel
from aipo_hpc.sharing import SharedShards
from aipo_hpc.store import Run

Tell = Callable[[str], None]
Show = Callable[[Decision, View], None]


_LONGEST_SETTLING = 2 * LOST_AFTER + 60.0
"""Seconds for which a driver that does not stay waits at most for elements of which it is not known what became of them."""


class Cancelled(Exception):
    """The user asked this driver to stop the run."""


class Driver:
    """Drives one run. ``tell`` gets a line for each thing that happens; ``show`` the state after each look."""

    def __init__(
        self,
        run: Run,
        run_id: str,
        graph: Graph,
        cluster: Cluster,
        journal: Journal,
        lease: Lease,
        tell: Tell,
        show: Show,
        keep_models: int | None = None,
    ) -> None:
        self._run = run
        self._run_id = run_id
        self._graph = graph
        self._cluster = cluster
        self._journal = journal
        self._lease = lease
        self._tell = tell
        self._show = show
        self._states: Mapping[str, Mapping[int, TaskState]] = {}
        self._queried = 0.0
        self._asked = float("-inf")
        self._began = time.time()
        self.unheard = False
        """The scheduler did not answer the last query."""
        self._over_since: dict[Element, float] = {}
        self._inspector = Inspector(run, graph)
        self._manifests = Manifests(run, graph)
        self._retention = Retention(run, graph, journal, tell, keep_models)
        self._allowance = Allowance(max(1.0, cluster.limits.query_interval), journal.answers)
        self._failed_since: dict[Element, float] = {}
        self._kept_off: set[str] = set()
        self._shared = SharedShards(run, graph, journal, cluster, tell)

    def follow(self, poll_seconds: float, stay: Callable[[Decision], bool] = lambda decision: True) -> bool:
        """Drive until the run is finished: True. False: with nothing to do for now, ``stay`` says not to wait here.

        Raises RunFailed when it cannot go on, Cancelled when asked to stop.
        """
        while True:
            decision = self.tick()
            if decision.finished:
                return True
            if decision.stuck:
                raise RunFailed(explain(self._run, decision.given_up))
            if self._lease.cancel_requested():
                self.cancel()
                raise Cancelled
            if not (decision.submit or decision.record):
                if not stay(decision):
                    return False
                time.sleep(poll_seconds)

    def settling(self, decision: Decision) -> bool:
        """Whether it will soon be known what became of an element that has ended: not a matter for who comes next."""
        return decision.settling and time.time() - self._began < _LONGEST_SETTLING

    def outstanding(self) -> list[str]:
        """The cluster's ids of submissions that, for all that is known, still wait or run."""
        return [
            submission.id
            for submission in self._unfinished(*self._files())
            if submission.id is not None
            and (
                self._queried <= submission.time
                or any(state.alive for state in self._states.get(submission.name, {}).values())
            )
        ]

    def tick(self) -> Decision:
        """One look, one decision, and its execution. Raises RunFailed if another driver has taken over."""
        view = self.look()
        self._check_lease()
        if self._retract_damaged(view) or self._retention.restore(view.done) or self._is_work_here(view):
            run_here(self._run, self._graph, self._journal, self._tell)
            view = self.look()
        self._manifests.update(view.done)
        decision = reconcile(self._graph, view, self._cluster.limits)
        for record in decision.record:
            self._record(record)
        for node in decision.bad_nodes.keys() - self._kept_off:
            self._kept_off.add(node)
            self._tell(f"node {node}: nothing is sent there any more, {decision.bad_nodes[node]}")
            self._journal.note("exclude", node=node, reason=decision.bad_nodes[node])
        for submit in decision.submit:
            if not self._submit(submit):
                break
        self._retention.apply(view.done)
        self._show(decision, view)
        return decision

    def look(self) -> View:
        """Ask the scheduler, if its turn has come, and then list the files: what it calls over must be visible then."""
        done, failures = self._files()
        pending = self._unfinished(done, failures)
        now = time.time()
        if pending and now - self._asked >= self._cluster.limits.query_interval:
            self._asked = now
            try:
                self._states = self._cluster.states(pending)
                self._queried = now
                self.unheard = False
            except ClusterError as error:
                self.unheard = True
                # A scheduler that does not answer says nothing about jobs: wait, conclude nothing.
                self._tell(f"scheduler does not answer, waiting: {error}")
            done, failures = self._files()
        self._tell_reports()
        for submission in pending:
            states = self._states.get(submission.name, {})
            for index in range(len(submission.shards)):
                state = states.get(index)
                if self._queried <= submission.time or (state is not None and state.alive):
                    self._over_since.pop((submission.name, index), None)
                else:
                    self._over_since.setdefault((submission.name, index), now)
        return View(
            done={name: sentinels.keys() for name, sentinels in done.items()},
            failures=failures,
            submissions=[each for each in pending if not each.extra],
            states=self._states,
            queried=self._queried,
            over_since=self._over_since,
            fence=self._journal.launched,
            now=time.time(),
            room=self._allowance.at(time.time()),
            failed_since=self._failed_since,
            nodes={name: _nodes(sentinels.values()) for name, sentinels in done.items()},
            shared=self._shared.look(done),
        )

    def _files(self) -> tuple[dict[str, Mapping[int, Sentinel]], dict[str, list[Failure]]]:
        """Finished shards and failures by job: one listing of each folder."""
        done: dict[str, Mapping[int, Sentinel]] = {}
        failures: dict[str, list[Failure]] = {}
        for name, job in self._graph.jobs.items():
            folder = self._run.job(name)
            done[name] = folder.done(self._graph.fingerprints[name], only=range(job.num_shards))
            failures[name] = folder.failures()
        now = time.time()
        for failure in (failure for each in failures.values() for failure in each):
            if (element := failure.element) is not None:
                self._failed_since.setdefault(element, now)
        return done, failures

    def _unfinished(
        self, done: Mapping[str, Mapping[int, Sentinel]], failures: Mapping[str, Sequence[Failure]]
    ) -> list[Submission]:
        """Submissions of this graph with a shard that is neither done nor known to have failed and to be over."""
        over: set[Element] = set()
        for failure in (failure for each in failures.values() for failure in each):
            element = failure.element
            if element is None:
                continue
            state = self._states.get(element[0], {}).get(element[1])
            if failure.by_driver or heard_over(state, self._queried, self._failed_since[element]):
                over.add(element)
        return [
            submission
            for submission in self._journal.submissions.values()
            if submission.job in self._graph.jobs
            and any(
                shard not in done[submission.job] and (submission.name, index) not in over
                for index, shard in enumerate(submission.shards)
            )
        ]

    def _retract_damaged(self, view: View) -> bool:
        """Have finished shards that workers found damaged, and that are so from here too, made again."""
        damaged = self._inspector.look(view.failures)
        for each in damaged:
            folder = self._run.job(each.job)
            message = f"finished, but {each.message}"
            # Recorded first: that the attempt failed is what has the shard sent again, and counts.
            folder.record_failure(
                Failure(
                    job=each.job,
                    shard=each.shard,
                    attempt=each.attempt,
                    fence=self._journal.fence,
                    kind="damaged",
                    message=message,
                    host=platform.node(),
                    time=time.time(),
                )
            )
            folder.retract(each.shard)
            self._journal.note("retract", job=each.job, shard=each.shard, message=message)
            self._tell(f"{each.job} shard {each.shard}: {message}; it is computed again")
        return bool(damaged)

    def _is_work_here(self, view: View) -> bool:
        """Whether something that the launch does itself is not done any more."""
        jobs = self._graph.jobs.values()
        return any(job.resources is None and len(view.done[job.name]) < job.num_shards for job in jobs)

    def _tell_reports(self) -> None:
        for name in self._graph.jobs:
            folder = self._run.job(name)
            while folder.reports:
                report = folder.reports.pop(0)
                self._tell(report)
                self._journal.note("report", message=report)

    def _record(self, record: RecordFailure) -> None:
        submission = self._journal.submissions[record.submission]
        self._run.job(record.job).record_failure(
            Failure(
                job=record.job,
                shard=record.shard,
                attempt=f"{record.submission}.{record.index}{BY_DRIVER}",
                fence=submission.fence,
                kind=record.kind,
                message=record.message,
                host=platform.node(),
                log=find_log(self._run, submission, record.index),
                time=time.time(),
                node=record.node,
                seconds=record.seconds,
                progressed=self._run.job(record.job).advanced(record.shard, f"{record.submission}.{record.index}"),
                extra=submission.extra,
            )
        )
        self._over_since.pop((record.submission, record.index), None)
        if record.kind != "dependency":
            who = ", an extra task" if submission.extra else ""
            self._tell(f"{record.job} shard {record.shard}{who}: {record.kind}, {record.message}")

    def _submit(self, submit: Submit) -> bool:
        """Send shards off; False if the scheduler has no room for them now."""
        self._check_lease()
        submission = self._journal.intend(
            self._run_id, submit.job, submit.shards, submit.after, submit.adjustment, submit.extra
        )
        after = [self._journal.submissions[dependency.after] for dependency in submit.after]
        try:
            self._check_lease()  # once more: writing the intent may have taken long on a file system that hangs
            identifier = self._cluster.submit(self._run, self._graph.jobs[submit.job], submission, after)
        except (SubmitRefused, RunFailed) as error:
            self._journal.refused(submission, str(error))
            as_asked = Adjustment(batch=submit.adjustment.batch)
            if isinstance(error, RunFailed) or submit.adjustment == as_asked:
                raise
            # What its failures ask for is more than the site gives: try as the recipe says.
            self._tell(f"{submit.job}: refused with {submit.adjustment}, sent without: {error}")
            return self._submit(replace(submit, adjustment=as_asked))
        except NoRoom as error:
            self._journal.refused(submission, str(error), full=True)
            if self._allowance.at(time.time()) is None:
                self._tell(f"{error}; sending fewer at once from now on, the rest as there is room")
            self._allowance.refused(len(submit.shards), time.time())
            return False
        except ClusterError as error:
            # It may have been taken all the same: it is looked up by name before anything is sent again.
            self._tell(f"{error}")
            return True
        self._journal.submitted(submission, identifier)
        self._allowance.accepted(len(submit.shards))
        waits = f", after {', '.join(sorted({each.job for each in after}))}" if after else ""
        adjusted = f", with {submit.adjustment}" if submit.adjustment != AS_ASKED else ""
        what = f"{len(submit.shards)} more for shard {submit.shards[0]}" if submit.extra else _some(submit.shards)
        self._tell(f"{submit.job}: sent {what} as {identifier}{waits}{adjusted}")
        return True

    def _check_lease(self) -> None:
        if not self._lease.holds():
            raise RunFailed(f"{self._run.path}: another driver has taken over this run; this one stops.")

    def cancel(self) -> None:
        """Stop all shards that wait or run; what is done stays done, and the run can be resumed."""
        pending = self._unfinished(*self._files())
        self._journal.note("cancel", submissions=[submission.name for submission in pending])
        self._cluster.cancel(pending)


def _nodes(sentinels: Iterable[Sentinel]) -> AbstractSet[str]:
    """The nodes that these shards were finished on, as the scheduler calls them."""
    return {each.scheduler["slurmd_nodename"] for each in sentinels if "slurmd_nodename" in each.scheduler}


def find_log(run: Run, submission: Submission, index: int) -> str:
    """The log of an element's first process, as submitit names it; empty if there is none."""
    if submission.id is None:
        return ""
    base = submission.id.split(":")[0]
    for name in (f"{base}_{index}_0_log.out", f"{base}_0_log.out"):
        path: Path = run.job(submission.job).logs / name
        if path.is_file():
            return str(path)
    return ""


def _some(shards: tuple[int, ...]) -> str:
    return f"{len(shards)} shards" if len(shards) > 1 else f"shard {shards[0]}"
