"""The Debian packages the sandbox runs on, installed when they are missing."""

import os
import shutil
import subprocess
import sys

from _sandbox.errors import SandboxError

# The daemons live in sbin, which a user's PATH often lacks.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

SLURM = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sinfo": "slurm-wlm", "munged": "munge"}
ACCOUNTING = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "mariadb-admin": "mariadb-server",
}


def missing(accounting: bool) -> dict[str, str]:
    """The commands that are not installed, each with the package that brings it."""
    wanted = SLURM | ACCOUNTING if accounting else SLURM
    return {command: package for command, package in wanted.items() if not shutil.which(command, path=PATH)}


def ensure_installed(accounting: bool) -> None:
    """Install what is missing with apt-get, or say exactly what the user has to install."""
    absent = missing(accounting)
    if not absent:
        return
    names = sorted(set(absent.values()))
    by_hand = f"apt-get update && apt-get install -y --no-install-recommends {' '.join(names)}"
    what = f"not installed: {', '.join(sorted(absent))} (packages: {', '.join(names)})"
    if not shutil.which("apt-get", path=PATH):
        raise SandboxError(
            f"{what}; this machine has no apt-get. Install Slurm, munge and MariaDB with its own "
            f"package manager, or use a Debian 12 container and run there: {by_hand}"
        )
    if os.geteuid() != 0:
        raise SandboxError(f"{what}; installing needs root. Run as root: {by_hand}")
    install(names)
    if absent := missing(accounting):
        raise SandboxError(f"still not installed: {', '.join(absent)}; run: {by_hand}")


def install(names: list[str]) -> None:
    """Install Debian packages; raises SandboxError when apt-get does not manage it."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "PATH": PATH}
    wait = ("-o", "DPkg::Lock::Timeout=600")  # somebody else may be installing just now
    for argv in (["apt-get", "update"], ["apt-get", "install", "-y", *wait, "--no-install-recommends", *names]):
        print(f"slurm_sandbox: {' '.join(argv)}", file=sys.stderr, flush=True)
        # apt's own lines go to stderr: stdout carries only the export line.
        done = subprocess.run(argv, check=False, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        if done.returncode:
            raise SandboxError(f"{' '.join(argv)} failed (its output is above); repair apt, then run start again")
