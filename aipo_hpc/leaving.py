"""The wish that this process leave: its time is nearly up, or its node is needed for something else.

Whoever knows the scheduler's signals asks; a stage looks between two batches or steps, where little or nothing is lost.
"""

from aipo_hpc.errors import AipoError

NOT_ASKED, SAVE, STOP = 0, 1, 2
"""SAVE: keep what there is, the end may come at any moment. STOP: also leave, to be continued by another attempt."""

_asked = NOT_ASKED
_ending = False


class Left(AipoError):
    """A stage stopped before its end because it was asked to; what it did is kept."""


def ask(wish: int) -> None:
    """Ask this process to save or to stop; called by the handlers of signals."""
    global _asked, _ending
    _asked = max(_asked, wish)
    _ending = _ending or wish == SAVE


def asked() -> int:
    """What was asked for and not yet done."""
    return _asked


def saved() -> None:
    """What was to be saved has been."""
    global _asked
    if _asked == SAVE:
        _asked = NOT_ASKED


def ending() -> bool:
    """Whether somebody is about to end this process, and whatever goes wrong in it now may be due to that."""
    return _ending


def here(where: str) -> None:
    """Raise Left if this process is to stop: called where a stage can."""
    if _asked == STOP:
        raise Left(f"{where}: asked to leave before the time limit; another attempt goes on from here")
