"""Models that come with Python code of their own: it is run for those alone for which the recipe asks.

A process keeps the folders for which it was asked (``trust``): the worker those of its task's inputs, the launch those it looks
into. Whatever loads a model asks here, so that trusting a ranker never lets the policy's code run, or the other way round.
"""

from pathlib import Path

_trusted: set[str] = set()


def trust(model: str) -> None:
    """Let the code in this model's folder be run by this process."""
    _trusted.add(_name(model))


def is_trusted(model: str) -> bool:
    """Whether the code that this model may bring may be run: what every loader's ``trust_remote_code`` is set to."""
    return _name(model) in _trusted


def needed(what: str, model: str) -> str:
    """What to say of a model that does not load without its code."""
    return (
        f"{what} {model!r} comes with code of its own (auto_map in its config.json), which is not run unless asked for. Read "
        "its .py files; if you trust them, set trust_remote_code=True for the policy, rank.trust_remote_code=True or "
        "evaluate.trust_remote_code=True for a ranker."
    )


def _name(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).exists() else model
