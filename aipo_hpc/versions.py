"""Which code made a result: the versions of the libraries that were used, and of this package with its git commit."""

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import aipo_hpc

_LIBRARIES = (
    "torch", "transformers", "vllm", "deepspeed", "trl", "accelerate", "peft", "datasets", "tokenizers", "safetensors",
    "llm_blender", "sentence_transformers", "sklearn", "numpy", "pyarrow",
)  # fmt: skip


def used_versions() -> dict[str, str]:
    """Versions of Python, of this package and of those libraries that this process has imported."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "aipo_hpc": own_version()}
    for name in _LIBRARIES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            found[name] = str(version)
    return found


@lru_cache
def own_version() -> str:
    """The package's version; in a git checkout with the commit, and ``.dirty`` if a tracked file differs from it."""
    package = Path(aipo_hpc.__file__).parent
    if not (package.parent / ".git").exists():
        return aipo_hpc.__version__
    command = ["git", "-C", str(package), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=.dirty"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        # Without git on the node, or in a checkout of somebody else's, the commit stays unknown: the work does not.
        return f"{aipo_hpc.__version__}+unknown"
    return f"{aipo_hpc.__version__}+g{told}"
