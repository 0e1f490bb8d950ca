"""A local Slurm cluster for tests, as a context manager around tools/slurm_sandbox."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOOL = Path(__file__).resolve().parent.parent / "tools" / "slurm_sandbox"


@dataclass(frozen=True)
class Sandbox:
    """A running cluster; ``env`` is what a command needs to find it."""

    folder: Path
    conf: Path
    flags: tuple[str, ...]

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def run(self, *argv: str, cwd: Path | None = None, timeout: float = 60) -> str:
        """A command's output on this cluster; a failing command fails the test with its words."""
        done = subprocess.run(
            argv,
            check=False,
            cwd=cwd or self.folder,
            env=_outer_environment() | self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{' '.join(argv)} exited {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def start(self) -> str:
        """Start again what is down; the export line."""
        return sandbox_tool("start", self.folder, *self.flags).stdout

    def status(self) -> subprocess.CompletedProcess[str]:
        return sandbox_tool("status", self.folder, check=False)

    def stop_daemon(self, name: str, *, kill: bool = False, with_jobs: bool = False) -> None:
        flags = [flag for flag, wanted in (("--kill", kill), ("--with-jobs", with_jobs)) if wanted]
        sandbox_tool("stop-daemon", self.folder, *flags, name)

    def start_daemon(self, name: str) -> None:
        sandbox_tool("start-daemon", self.folder, name)


@contextlib.contextmanager
def running_sandbox(folder: Path, **flags: int | bool) -> Iterator[Sandbox]:
    """A cluster in ``folder``, gone with all its processes at the end.

    ``flags`` are those of ``tools/slurm_sandbox start``: ``nodes=1, no_accounting=True``.
    """
    options = tuple(
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in flags.items()
        if value is not False
    )
    try:
        export = sandbox_tool("start", folder, *options).stdout
        yield Sandbox(folder, Path(export.strip().removeprefix("export SLURM_CONF=")), options)
    finally:
        sandbox_tool("stop", folder)


def sandbox_tool(command: str, folder: Path, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """One call of tools/slurm_sandbox; its own words are the error."""
    done = subprocess.run(
        [sys.executable, str(TOOL), command, f"--dir={folder}", *options],
        check=False,
        env=_outer_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,  # the first start on a bare machine installs packages
    )
    if check and done.returncode:
        raise RuntimeError(f"slurm_sandbox {command} exited {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def _outer_environment() -> dict[str, str]:
    """Without the variables of a job or a cluster that the tests themselves may run in."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
