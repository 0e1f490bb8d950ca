"""Which code did the work: libraries that were imported, and this package with its commit."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import aipo_hpc
from aipo_hpc.versions import own_version, used_versions


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    own_version.cache_clear()
    yield
    own_version.cache_clear()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout in which the package seems to lie."""
    package = tmp_path / "checkout" / "aipo_hpc"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one\n")
    monkeypatch.setattr(aipo_hpc, "__file__", str(package / "__init__.py"))
    return package.parent


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_only_what_was_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.__version__ = "9.8.7"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    found = used_versions()
    assert found["vllm"] == "9.8.7" and "trl" not in found
    assert found["python"] == sys.version.split()[0] and found["aipo_hpc"].startswith(aipo_hpc.__version__)


def test_an_installed_package_is_known_by_its_version(checkout: Path) -> None:
    assert own_version() == aipo_hpc.__version__


def test_a_checkout_is_known_by_its_commit_and_by_whether_a_file_differs_from_it(checkout: Path) -> None:
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    git(checkout, "tag", "-a", "v9", "-m", "a tag is not what is asked for")
    commit = git(checkout, "rev-parse", "HEAD")
    assert own_version() == f"{aipo_hpc.__version__}+g{commit}"
    (checkout / "aipo_hpc/__init__.py").write_text("two\n")
    own_version.cache_clear()
    assert own_version() == f"{aipo_hpc.__version__}+g{commit}.dirty"


def test_a_commit_that_git_does_not_tell_is_unknown_and_stops_nothing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / ".git").mkdir()  # not a repository: git refuses
    assert own_version() == f"{aipo_hpc.__version__}+unknown"
    own_version.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert own_version() == f"{aipo_hpc.__version__}+unknown"
