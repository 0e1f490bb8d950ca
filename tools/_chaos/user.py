"""Somebody who types the launch command again whenever it is not running, and does nothing else."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

PATIENCE = 12
"""Launches that may end in a row without anything new being done: more of them means that a human is needed."""


class Watched(Protocol):
    """What the user sees of the run."""

    def complete(self) -> bool:
        """Whether there is nothing more to do, once a launch has ended well."""
        ...

    def at_work(self) -> bool:
        """Whether something of it waits or runs without a launch."""
        ...

    def num_done(self) -> int:
        """How much is done, to tell whether typing helps."""
        ...


class HumanNeededError(Exception):
    """Typing the same command again does not help any more."""


class User:
    """The launch command as a process, its output in a file."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.argv = list(argv)
        self.environment = dict(environment)
        self.log = log
        self.launches = 0
        self.finished = False
        self.exits: list[str] = []
        """Why launches ended, those that nobody killed: the last line that each said."""
        self._process: subprocess.Popen[bytes] | None = None
        self._in_vain = 0
        self._progress = -1

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def attend(self, run: Watched) -> None:
        """Start the command if it is not running, and the run is neither complete nor goes on without it."""
        if self.running or self.finished:
            return
        if self._process is not None:
            code = self._process.returncode
            if code == 0 and run.complete():
                self.finished = True
                return
            if code == 0 and run.at_work():
                return
            if code > 0:
                self.exits.append(self._last_words())
            done = run.num_done()
            self._in_vain = self._in_vain + 1 if done == self._progress and code >= 0 else 0
            self._progress = done
            if self._in_vain > PATIENCE:
                raise HumanNeededError(
                    f"{self._in_vain} launches in a row did nothing; the last ones said:\n{self._tail()}"
                )
            time.sleep(min(0.5 * (1 + self._in_vain), 5.0))
        with self.log.open("ab") as output:
            output.write(f"== launch {self.launches + 1}\n".encode())
            self._process = subprocess.Popen(self.argv, env=self.environment, stdout=output, stderr=output)
        self.launches += 1

    def type_once_more(self) -> None:
        """Have the command started again, though it has ended well."""
        self.finished = False
        self._process = None

    def kill(self) -> bool:
        """SIGKILL to the command; False if it was not running."""
        if not self.running:
            return False
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        return True

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines[-60:] if "Error:" in line or "Full:" in line or "Failed:" in line]
        return (errors or lines or [""])[-1]
