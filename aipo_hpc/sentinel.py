"""What a shard leaves behind: the sentinel of a finished one, the record of a failed attempt."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    """Models of the GPUs that the task had."""
    num_processes: int = 1

    @property
    def digest(self) -> str:
        """SHA-256 over all fields: what makes a half-written or altered sentinel recognisable."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """One JSON object, with the digest."""
        return json.dumps({**dataclasses.asdict(self), "digest": self.digest}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "Sentinel":
        """Parse; raises ValueError for anything that is not a whole, unaltered sentinel."""
        try:
            fields = json.loads(text)
            digest = fields.pop("digest")
            fields["outputs"] = tuple(Output(**output) for output in fields["outputs"])
            fields["gpus"] = tuple(fields["gpus"])
            sentinel = Sentinel(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a sentinel: {error}") from error
        if digest != sentinel.digest:
            raise ValueError("its digest does not fit its content")
        return sentinel


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
