"""Every error that a user of this package can meet.

    AipoError
    ├── UserError              the user can mend it: a wrong setting, path, file; never retried
    │   ├── RecipeError        a recipe, field or value that is unknown or does not make sense
    │   ├── DataError          a prompt source, dataset or model folder that cannot be used
    │   ├── GraphError         a job graph that does not hold together
    │   ├── DriftError         a relaunch whose settings differ from what was already computed
    │   ├── RunError           a run directory that cannot be used: another recipe's, unwritable, driven by someone else
    │   └── GuardStop          a sign of drift beyond the threshold that stops the run
    ├── ClusterError           the scheduler said no, or did not answer
    │   ├── SubmitRefused      ... and it will say no again: a mistyped partition, a limit of one job
    │   └── NoRoom             ... because too much is waiting or running already: fewer, or later
    ├── InputNotVisible        a finished input is not (yet) to be seen from this node
    ├── DiskFull               no space left where the run lives
    └── RunFailed              nothing in the run can proceed any more

Each message says what, where, and what to do next.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aipo_hpc.sentinel import Blame


class AipoError(Exception):
    """Base of all errors raised on purpose by this package."""


class UserError(AipoError):
    """The user has to change something; trying again does not help."""


class RecipeError(UserError):
    """A recipe, field or value that is unknown or does not make sense."""


class DataError(UserError):
    """A prompt source, dataset or model folder that cannot be used."""


class GraphError(UserError):
    """A job graph that does not hold together."""


class DriftError(UserError):
    """The settings of a job differ from those its finished work was made with."""


class RunError(UserError):
    """A run directory that cannot be used."""


class GuardStop(UserError):
    """A value of the guard is beyond the threshold at which the user wants the run to stop."""


class ClusterError(AipoError):
    """The scheduler did not answer, or answered with an error that may pass."""


class SubmitRefused(ClusterError):
    """The scheduler refused a submission and would refuse it again."""


class NoRoom(ClusterError):
    """The scheduler takes no more jobs of this user for now."""


class InputNotVisible(AipoError):
    """A finished input's files cannot be seen from this node within the bounded wait. ``blames`` names its shards."""

    def __init__(self, message: str, blames: "tuple[Blame, ...]" = ()) -> None:
        super().__init__(message)
        self.blames = blames


class DiskFull(AipoError):
    """No space left on the file system of the run directory."""


class RunFailed(AipoError):
    """Nothing in the run can proceed any more without the user."""
