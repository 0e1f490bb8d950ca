"""Ends the processes of an engine whose main process died without a word.

vLLM's engine process does not notice that its parent was killed (kill -9, out of memory) and would hold the GPU for ever
where no cgroup ends it. The guard is a small process of its own that waits for the main process to end and then kills what
is left of its descendants: ``python -m aipo_hpc.engines.guard PID``.
"""

import functools
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

from aipo_hpc.processes import descendants, start_time

_SECONDS_BETWEEN_LOOKS = 1.0


@functools.cache
def guard_children(pid: int) -> "subprocess.Popen[bytes]":
    """Start the guard of process ``pid``, which is this one; one is enough however many engines there are."""
    return subprocess.Popen(
        [sys.executable, "-m", "aipo_hpc.engines.guard", str(pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def watch(pid: int) -> None:
    """Return when ``pid`` has ended and none of the processes that it had is left."""
    known: dict[int, str | None] = {}
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    while not select.select([ended], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
        for child in descendants(pid):
            if child != os.getpid():
                known.setdefault(child, start_time(child))
    for child, started in known.items():
        if started is not None and start_time(child) == started:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    watch(int(sys.argv[1]))
