"""What the driver did, told by its journal: launches with their fencing numbers, and submissions.

The intent to submit is written before the scheduler is asked and its answer after, so that a driver killed in between
leaves a submission without an id, which its successor looks up by name instead of sending it twice.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from aipo_hpc.adjustment import AS_ASKED, Adjustment
from aipo_hpc.clusters import Dependency, Submission
from aipo_hpc.store import Run


class Journal:
    """The driver's view of a run's journal."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.fence = 0
        self.launched = 0
        """Fencing number of the last launch that was typed: failures of earlier ones are forgiven. A chain's step is none."""
        self.submissions: dict[str, Submission] = {}
        self.answers: list[tuple[int, bool]] = []
        """How many shards the scheduler was to take, each time since that launch, and whether it had room for them."""
        self._numbers = 0
        for event in run.read_journal():
            self._replay(event)

    def _replay(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("launch", "step"):
            self.fence = max(self.fence, int(event["fence"]))
            if kind == "launch":
                self.launched, self.answers = self.fence, []
        elif kind == "submit":
            submission = Submission(
                name=event["name"],
                job=event["job"],
                shards=tuple(event["shards"]),
                after=tuple(Dependency(**{**each, "indices": tuple(each["indices"])}) for each in event["after"]),
                fence=event["fence"],
                time=event["time"],
                adjustment=read_adjustment(event.get("adjustment", {})),
                extra=event.get("extra", False),
            )
            self.submissions[submission.name] = submission
            self._numbers = max(self._numbers, int(submission.name.rsplit("-", 1)[1]))
        elif kind == "submitted":
            name = str(event["name"])
            if name in self.submissions:
                self.submissions[name] = replace(self.submissions[name], id=str(event["id"]))
                self.answers.append((len(self.submissions[name].shards), True))
        elif kind == "refused":
            refused = self.submissions.pop(str(event["name"]), None)
            if refused is not None and event.get("full"):
                self.answers.append((len(refused.shards), False))
        elif kind == "reset":
            self._forget(event["jobs"])

    def launch(self, **fields: object) -> int:
        """Note that a driver begins; returns its fencing number, higher than any before."""
        self.fence = self.launched = self.fence + 1
        self._run.append_journal("launch", fence=self.fence, **fields)
        return self.fence

    def step(self) -> int:
        """Note that a driver takes up where another passed on; returns its fencing number, higher than any before."""
        self.fence += 1
        self._run.append_journal("step", fence=self.fence)
        return self.fence

    def intend(
        self,
        run_id: str,
        job: str,
        shards: tuple[int, ...],
        after: tuple[Dependency, ...],
        adjustment: Adjustment = AS_ASKED,
        extra: bool = False,
    ) -> Submission:
        """Note the intent to submit and return the submission with its unique name."""
        self._numbers += 1
        name = f"aipo-{run_id}-{self._numbers}"
        submission = Submission(name, job, shards, after, self.fence, time.time(), None, adjustment, extra)
        fields = {key: value for key, value in asdict(submission).items() if key not in ("id", "time")}
        self._run.append_journal("submit", **fields)
        self.submissions[name] = submission
        return submission

    def submitted(self, submission: Submission, identifier: str) -> None:
        """Note the scheduler's answer."""
        self._run.append_journal("submitted", name=submission.name, id=identifier)
        self.submissions[submission.name] = replace(submission, id=identifier)

    def refused(self, submission: Submission, message: str, full: bool = False) -> None:
        """Note that the scheduler did not take it; ``full``: that it has no room for so many shards."""
        self._run.append_journal("refused", name=submission.name, message=message, full=full)
        del self.submissions[submission.name]

    def reset(self, jobs: Sequence[str], **fields: object) -> None:
        """Note that these jobs are to be computed anew: what was sent of them is forgotten."""
        self._run.append_journal("reset", jobs=list(jobs), **fields)
        self._forget(jobs)

    def _forget(self, jobs: Sequence[str]) -> None:
        self.submissions = {name: each for name, each in self.submissions.items() if each.job not in jobs}

    def note(self, event: str, **fields: object) -> None:
        """Note anything else that was decided."""
        self._run.append_journal(event, **fields)


def read_adjustment(fields: dict[str, Any]) -> Adjustment:
    """The inverse of ``asdict``."""
    return Adjustment(**{**fields, "exclude": tuple(fields.get("exclude", ()))})
