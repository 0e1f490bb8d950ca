"""drive=chain: no process stays anywhere. Each step looks, decides and submits, then submits its successor and ends.

The successor is a small Slurm job. It comes when any of the submissions that are outstanding has ended (``afterany`` of each,
joined by ``?``), and at the latest some minutes from now (``after`` this step or those submissions, with a delay): so that an
element that failed beside long ones is sent again. It never comes earlier than ``slurm.step_seconds`` (``begin``): a
dependency on an id that Slurm has forgotten holds nothing back. With nothing outstanding it just comes then.

All steps of a run have one name. Before a successor is submitted it is looked up by that name, so there is one at most: also
when the answer of an sbatch was lost, and when the launch command is typed again while a step waits. A step that was killed is
replaced by typing that command; one whose node fails, or whose time ends, Slurm requeues. One that finds the run driven by
another process, or the recipe no longer in this mode, ends the chain.
"""

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from aipo_hpc.clusters import Cluster
from aipo_hpc.decision import Decision
from aipo_hpc.driver import Driver, Tell
from aipo_hpc.errors import ClusterError, SubmitRefused
from aipo_hpc.journal import Journal
from aipo_hpc.recipe import Recipe
from aipo_hpc.store import Run

if TYPE_CHECKING:
    from aipo_hpc.clusters.steps import LivingStep, Steps

LOOK_AGAIN = 15
"""Minutes after which a step comes though nothing has ended."""
_MOST_WATCHED = 20
"""Submissions that a step waits for, at most: the oldest of many."""


class Successors(Protocol):
    """Where successors are found and submitted."""

    def living(self, but: str | None = None) -> Sequence["LivingStep"]:
        """Steps that wait or run, apart from one."""
        ...

    def send(self, run: Run, after: Sequence[str], delay: float) -> str:
        """Submit one; returns its id."""
        ...


class Chain:
    """One step of a chain: drives as far as it goes now, then passes on."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        steps: Successors,
        driver: Driver,
        journal: Journal,
        tell: Tell,
        own_id: str | None,
    ) -> None:
        self._run = run
        self._poll = recipe.poll_seconds
        self._delay = recipe.slurm.step_seconds
        self._steps = steps
        self._driver = driver
        self._journal = journal
        self._tell = tell
        self._own_id = own_id
        self._wait: float | None = None
        """Seconds until a shard that failed is tried again, if one is."""

    def advance(self) -> bool:
        """True when the run is finished; False once a successor is to go on with it."""
        while not self._driver.follow(self._poll, stay=self._stay):
            try:
                self._pass_on()
                return False
            except SubmitRefused:
                raise
            except ClusterError as error:
                # Without a successor the run would stand still, so this step stays until it has one.
                self._tell(f"{error}; trying again")
                time.sleep(max(self._poll, 1.0))
        return True

    def _stay(self, decision: Decision) -> bool:
        """Whether something will be known so soon that no successor is needed for it, or could be sent for it."""
        due = [when for shards in decision.waiting.values() for when in shards.values()]
        self._wait = max(self._delay, min(due) - time.time()) if due else None
        return self._driver.unheard or self._driver.settling(decision)

    def _pass_on(self) -> None:
        for step in self._steps.living(but=self._own_id):
            self._tell(f"the next step is job {step.id} ({step.what})")
            return
        after = dependencies(self._driver.outstanding(), self._own_id, self._wait)
        delay = self._delay if after or self._wait is None else self._wait
        identifier = self._steps.send(self._run, after, delay)
        self._journal.note("successor", id=identifier, after=after)
        self._tell(f"the next step is job {identifier}, after {' or '.join(after) or f'{delay:.0f} s'}")


def dependencies(outstanding: list[str], own_id: str | None, wait: float | None = None) -> list[str]:
    """What the successor waits for, any of it: the end of an outstanding job, or some minutes (until a retry is due)."""
    minutes = LOOK_AGAIN if wait is None else min(LOOK_AGAIN, math.ceil(wait / 60))
    watched = outstanding[:_MOST_WATCHED]
    since = [own_id] if own_id is not None and watched else watched
    return [
        *(f"afterany:{identifier}" for identifier in watched),
        *(f"after:{identifier}+{minutes}" for identifier in since),
    ]


def make_steps(recipe: Recipe, cluster: Cluster, run_id: str) -> "Steps":
    """The steps of a run."""
    from aipo_hpc.clusters.slurm import SlurmCluster
    from aipo_hpc.clusters.steps import Steps

    assert isinstance(cluster, SlurmCluster)
    return Steps(cluster, recipe.slurm, run_id)
