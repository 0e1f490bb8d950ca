"""The rows that travel between stages, and their Parquet files.

Conversation conversations -> sft
Prompt      prompts   -> generate, clusters, instruct; collect -> generate
Clustered   clusters  -> instruct            which cluster a prompt of the pool is in
Call        instruct                         what one call of self-instruct showed and got
NewPrompt   instruct  -> collect             a prompt that the policy made
Responses   generate  -> rank, evaluate      one row per prompt, n candidates
Ranked      rank      -> pairs               Responses + a score and a rank per candidate
KeptOut     kept_out  -> pairs               a benchmark's prompt
Pair        pairs     -> reference           chosen and rejected text; also to later pairs
TrainRow    reference -> train               token ids + reference log-probabilities
Verdict     evaluate  -> report              an answer against the initial policy's answer to the same prompt
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A conversation to learn from; the last turn is the assistant's."""

    conversation_id: str
    messages: list[Message]


@dataclass(frozen=True)
class Prompt:
    """One prompt; ``messages`` is the conversation up to and including the user's last turn."""

    prompt_id: str
    prompt: str
    messages: list[Message]
    answer: str | None = None
    """The source's own answer to it."""


@dataclass(frozen=True)
class Clustered:
    """The cluster of a prompt."""

    prompt_id: str
    cluster: int


@dataclass(frozen=True)
class Call:
    """One call of self-instruct: the prompts that it showed, and how the model went on; ``error`` says why it did not."""

    call_id: str
    cluster: int
    seed_ids: list[str]
    text: str
    finish_reason: str
    num_tokens: int
    error: str | None = None


@dataclass(frozen=True)
class NewPrompt:
    """A prompt that the policy made in a call."""

    prompt_id: str
    prompt: str
    cluster: int
    call_id: str


@dataclass(frozen=True)
class Candidate:
    """One response. ``finish_reason`` is ``stop`` (an end-of-sequence token) or ``length`` (cut off)."""

    response: str
    finish_reason: str
    num_tokens: int
    source: str = "sampled"
    """How it came about: sampled, greedy, second_temperature, or dataset (the prompt source's own answer)."""


@dataclass(frozen=True)
class Responses:
    """A prompt with its candidates; ``error`` says why there are none for a prompt that could not be served."""

    prompt_id: str
    prompt: str
    messages: list[Message]
    candidates: list[Candidate]
    error: str | None = None


@dataclass(frozen=True)
class Opinion:
    """What one ranker said of a prompt's candidates: that of each member of an ensemble, of any other ranker the only one.

    ``replies`` and what follows are counts of a judge's replies, see ``rankers.Ranking``.
    """

    ranker: str
    scores: list[float]
    prompt_truncated: bool = False
    replies: int = 0
    unparsable: int = 0
    ties: int = 0
    contradictions: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Ranked:
    """Responses with a score (higher is better) and a rank (1 is best, ties share the better rank) per candidate."""

    prompt_id: str
    prompt: str
    messages: list[Message]
    candidates: list[Candidate]
    scores: list[float]
    ranks: list[int]
    truncated: list[bool]
    """Which candidates the ranker saw only in part."""
    error: str | None = None
    opinions: list[Opinion] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class KeptOut:
    """A benchmark's prompt to keep out of training, and where it is from."""

    source: str
    text: str


@dataclass(frozen=True)
class Pair:
    """A preference pair. ``source`` is ``own`` (made in this iteration), an earlier iteration, or the name of a dataset."""

    prompt_id: str
    prompt: str
    messages: list[Message]
    chosen: Candidate
    rejected: Candidate
    chosen_score: float
    rejected_score: float
    source: str = "own"


@dataclass(frozen=True)
class TrainRow:
    """A pair as token ids; log-probabilities are sums over the response's tokens, in nats, under the reference.

    Those called ``shared`` run only over the first tokens, as many as the shorter response has.
    """

    prompt_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    ref_chosen_logps: float
    ref_rejected_logps: float
    ref_chosen_shared_logps: float
    ref_rejected_shared_logps: float
    error: str | None = None
    """Why the pair could not be scored; nobody trains on it."""


@dataclass(frozen=True)
class Verdict:
    """One held-out prompt: ``win`` is 1, 0.5 (tie) or 0 for the new policy; lengths are in characters."""

    prompt_id: str
    prompt: str
    response: str
    baseline_response: str
    margin: float
    win: float
    length: int
    baseline_length: int


PROMPT_TOO_LONG = "prompt too long"
"""How ``Responses.error`` begins for a prompt with more tokens than the recipe allows."""
PROMPT_TOO_SHORT = "prompt too short"
"""How ``Responses.error`` begins for a prompt with fewer tokens than the recipe allows."""

Row = TypeVar("Row")


@lru_cache
def schema(kind: Any) -> "pa.Schema":
    """The Arrow schema of a row type, read off its annotations."""
    import pyarrow as pa

    return pa.schema([_field(field.name, field.type) for field in dataclasses.fields(kind)])


def _field(name: str, annotation: Any) -> "pa.Field":
    import types
    import typing

    import pyarrow as pa

    nullable = False
    if isinstance(annotation, types.UnionType):
        (annotation,) = [part for part in typing.get_args(annotation) if part is not type(None)]
        nullable = True
    return pa.field(name, _arrow(annotation), nullable=nullable)


def _arrow(annotation: Any) -> "pa.DataType":
    import typing

    import pyarrow as pa

    if dataclasses.is_dataclass(annotation):
        return pa.struct([_field(field.name, field.type) for field in dataclasses.fields(annotation)])
    if typing.get_origin(annotation) is list:
        return pa.list_(_arrow(typing.get_args(annotation)[0]))
    return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[annotation]


def write_rows(path: Path, rows: Sequence[Any], kind: type[Any]) -> None:
    """Write rows to one Parquet file, durably: same rows, same bytes. An empty sequence gives an empty, valid file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([to_plain(row) for row in rows], schema=schema(kind))  # type: ignore[arg-type]
    pq.write_table(table, path, compression="zstd")
    with path.open("rb") as written:
        os.fsync(written.fileno())


def read_rows(paths: Iterable[Path], kind: type[Row]) -> Iterator[Row]:
    """Yield the rows of Parquet files in order, a batch in memory at a time."""
    import pyarrow.parquet as pq

    for path in paths:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for plain in batch.to_pylist():
                    yield from_plain(plain, kind)


def to_plain(row: Any) -> dict[str, Any]:
    """A row as nested dicts and lists (JSON values); lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    plain: dict[str, Any] = _clean(dataclasses.asdict(row))
    return plain


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace_surrogate").decode("utf-8")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    return value


def from_plain(plain: dict[str, Any], kind: type[Row]) -> Row:
    """The inverse of ``to_plain``."""
    converted = dict(plain)
    for name, nested, many in _nested(kind):  # type: ignore[arg-type]
        if many:
            converted[name] = [nested(**item) for item in plain[name]]
        else:
            converted[name] = nested(**plain[name])
    return kind(**converted)


@lru_cache
def _nested(kind: Any) -> list[tuple[str, type[Any], bool]]:
    import typing

    found: list[tuple[str, type[Any], bool]] = []
    for field in dataclasses.fields(kind):
        parts = typing.get_args(field.type)
        if dataclasses.is_dataclass(field.type):
            found.append((field.name, field.type, False))  # type: ignore[arg-type]
        elif parts and dataclasses.is_dataclass(parts[0]):
            found.append((field.name, parts[0], True))  # type: ignore[arg-type]
    return found


def _replace_surrogate(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    # As bytes: the encoder takes text from a handler only if it is ASCII.
    return "�".encode() * (error.end - error.start), error.end


def _register() -> None:
    import codecs

    codecs.register_error("replace_surrogate", _replace_surrogate)


_register()
