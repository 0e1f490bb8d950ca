"""What a shard leaves behind: the sentinel of a finished one, the record of a failed attempt."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_DIGEST, _END = ',\n "digest": "', '"\n}\n'


@dataclass(frozen=True)
class Output:
    """One file of a finished shard: path relative to the shard's folder, size in bytes, SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Sentinel:
    """The proof that a shard is done, and all that is worth knowing about how."""

    job: str
    shard: int
    fingerprint: str
    attempt: str
    fence: int
    """Fencing number of the driver that submitted the attempt."""
    rows: int
    outputs: tuple[Output, ...]
    inputs: Mapping[str, Any]
    """Lineage: per input, the digests of the sentinels it was read from, or the identity of an outside input."""
    counts: Mapping[str, float]
    started: float
    ended: float
    host: str
    scheduler: Mapping[str, str] = field(default_factory=dict)
    """Slurm's ids of the task, where there are any."""
    gpus: tuple[str, ...] = ()
    """Models of the GPUs that the task had, on its first node."""
    num_processes: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the code that did the work, see ``versions.py``."""

    @property
    def digest(self) -> str:
        """SHA-256 over the text of all fields: what makes a half-written or altered sentinel recognisable."""
        return _digest(self._body())

    def to_json(self) -> str:
        """One JSON object, with the digest of all that comes before it as its last field."""
        body = self._body()
        return f"{body}{_DIGEST}{_digest(body)}{_END}"

    def _body(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1).removesuffix("\n}")

    @staticmethod
    def from_json(text: str) -> "Sentinel":
        """Parse; raises ValueError for anything that is not a whole, unaltered sentinel."""
        body, _, rest = text.rpartition(_DIGEST)
        if not body or rest != f"{_digest(body)}{_END}":
            # The text as it stands is checked: a driver reads thousands of these when it starts.
            raise ValueError("its digest does not fit its content")
        try:
            fields = json.loads(f"{body}}}")
            fields["outputs"] = tuple(Output(**output) for output in fields["outputs"])
            fields["gpus"] = tuple(fields["gpus"])
            return Sentinel(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a sentinel: {error}") from error


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def element_of(attempt: str) -> tuple[str, int] | None:
    """The submission's name and the index in it, of an attempt; None for one of another kind of name."""
    name, _, index = attempt.rpartition(".")[0].rpartition(".")
    return (name, int(index)) if index.isdecimal() else None


BY_DRIVER = ".driver"
"""How the attempt of a failure ends that was recorded by the driver, in the name of a task that died without a word."""


@dataclass(frozen=True)
class Blame:
    """A finished shard that a worker could not read, and the digest of the sentinel it went by (none: it saw none)."""

    job: str
    shard: int
    digest: str = ""


@dataclass(frozen=True)
class Failure:
    """One failed attempt at a shard. ``kind`` is a class of ``aipo_hpc.failures``."""

    job: str
    shard: int
    attempt: str
    fence: int
    kind: str
    message: str
    traceback: str = ""
    host: str = ""
    log: str = ""
    time: float = 0.0
    node: str = ""
    """The scheduler's name of the node; of several, all of them."""
    seconds: float | None = None
    """How long the attempt had run, as far as it is known."""
    progressed: bool = False
    """Whether the attempt got further than those before it."""
    blames: tuple[Blame, ...] = ()
    """Finished inputs that the attempt waited for in vain."""
    extra: bool = False
    """Whether it did part of a shard that another attempt was to finish; the shard has not failed by that."""

    @property
    def element(self) -> tuple[str, int] | None:
        """The submission's name and the index in it; None for an attempt that was started by hand."""
        return element_of(self.attempt)

    @property
    def by_driver(self) -> bool:
        """Whether the driver recorded it, because the scheduler had said that the element is over."""
        return self.attempt.endswith(BY_DRIVER)

    @staticmethod
    def from_json(text: str) -> "Failure":
        """Parse; raises ValueError or TypeError for anything that is not a whole record."""
        fields = json.loads(text)
        fields["blames"] = tuple(Blame(**blame) for blame in fields.get("blames", ()))
        return Failure(**fields)
