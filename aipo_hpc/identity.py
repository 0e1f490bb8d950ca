"""What outside things are, told by their content: a model folder or a prompt file that moves stays the same thing."""

import hashlib
import json
from pathlib import Path

_BLOCK = 1 << 16
_SAMPLES = 16
_WHOLE = 1 << 24


def looks_local(name_or_path: str) -> bool:
    """Whether a model or dataset name is meant as a path: it exists, or could not be a hub id."""
    path = Path(name_or_path).expanduser()
    return path.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1


def identify(name_or_path: str, revision: str | None = None) -> str:
    """The identity of a hub name (name and revision) or of a local file or folder (digest of its content)."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return f"sha256:{_digest(path)}"
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        listing = [(str(file.relative_to(path)), file.stat().st_size, _digest(file)) for file in files]
        return f"sha256:{hashlib.sha256(json.dumps(listing).encode()).hexdigest()}"
    return name_or_path if revision is None else f"{name_or_path}@{revision}"


def _digest(path: Path) -> str:
    """SHA-256 of a file; of big ones (model weights) evenly spaced blocks, so that naming a model stays cheap."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for sample in range(_SAMPLES):
                file.seek((size - _BLOCK) * sample // (_SAMPLES - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
