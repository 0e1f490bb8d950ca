"""The daemons of one sandbox in order: start, stop, status."""

import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

from _sandbox import cgroups, config, packages
from _sandbox import folder as folders
from _sandbox import process as processes
from _sandbox.errors import SandboxError
from _sandbox.folder import Folder, Settings
from _sandbox.process import Process

# Seconds a daemon may take to answer. All are up within a few; a busy machine gets patience.
_PATIENCE = 90.0
_GRACE = 10.0
_WORKING = ("idle", "mixed", "allocated", "completing")
# Small and without durability: the data lives as long as the sandbox.
_MARIADB = [
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=16M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-lock-wait-timeout=900",
]
_begun = time.monotonic()


def say(text: str) -> None:
    print(f"slurm_sandbox: {time.monotonic() - _begun:5.1f} s  {text}", file=sys.stderr, flush=True)


class Cluster:
    """The daemons of one folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.environment = {
            "PATH": packages.PATH,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(folder.conf),
            processes.MARK: str(folder.root),
        }

    def argv(self, name: str) -> list[str]:
        root, run = self.folder.root, self.folder.run
        match name:
            case "munged":
                # --force: munge warns instead of refusing when a folder above its socket is private.
                return [
                    *("munged", "--foreground", "--force", f"--socket={self.folder.munge_socket}"),
                    *(f"--key-file={root}/munge.key", f"--seed-file={root}/munge.seed"),
                    *(f"--pid-file={run}/munged.pid", f"--log-file={self.folder.log('munged')}"),
                ]
            case "mariadbd":
                return [
                    *("mariadbd", "--no-defaults", "--user=root", f"--datadir={root}/db", *_MARIADB),
                    *(f"--socket={run}/mariadb.sock", f"--pid-file={run}/mariadb.pid", "--bind-address=127.0.0.1"),
                    *(
                        f"--port={self.folder.ports['mariadbd']}",
                        f"--init-file={root}/accounts.sql",
                        "--skip-name-resolve",
                    ),
                ]
            case "slurmdbd" | "slurmctld":
                return [name, "-D"]
            case _:
                return ["slurmd", "-D", "-N", name]

    def process(self, name: str) -> Process | None:
        """The daemon's process while it lives."""
        process = Process.recorded(self.folder.record(name))
        return process if process and process.alive() else None

    def ask(self, *argv: str) -> str:
        """A command's output, or "" when it failed: for questions put again and again."""
        try:
            done = subprocess.run(argv, check=False, env=self.environment, capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout if done.returncode == 0 else ""

    def answers(self, name: str) -> bool:
        match name:
            case "munged":
                return bool(self.ask("munge", "--no-input", f"--socket={self.folder.munge_socket}"))
            case "mariadbd":
                # Exits 0 even for a user without access: it only asks whether the server talks.
                return bool(
                    self.ask("mariadb-admin", "--no-defaults", f"--socket={self.folder.run}/mariadb.sock", "ping")
                )
            case "slurmdbd":
                # Asked first, because sacctmgr retries for long on a closed port.
                if not self._listens(name):
                    return False
                if not self._registered_clusters():
                    self.ask("sacctmgr", "--immediate", "add", "cluster", config.CLUSTER)
                return bool(self._registered_clusters())
            case "slurmctld":
                return "UP" in self.ask("scontrol", "ping")
            case _:
                state = self.ask("sinfo", "--noheader", f"--nodes={name}", "--partition=main", "--format=%T").strip()
                return state in _WORKING

    def _listens(self, name: str) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.folder.ports[name]), timeout=1).close()
        except OSError:
            return False
        return True

    def _registered_clusters(self) -> dict[str, str]:
        """Cluster to the port of its slurmctld, 0 while slurmctld has not introduced itself."""
        lines = self.ask("sacctmgr", "--noheader", "--parsable2", "list", "cluster", "format=cluster,controlport")
        return dict(line.split("|", 1) for line in lines.splitlines() if "|" in line)

    def launch(self, name: str) -> None:
        processes.launch(self.argv(name), self.folder.record(name), self.folder.log(name), self.environment)

    def await_answer(self, name: str) -> None:
        if not processes.wait_until(lambda: not self.process(name) or self.answers(name), _PATIENCE):
            raise SandboxError(f"{name} runs but did not answer within {_PATIENCE:.0f} s; {self._tail(name)}")
        if not (process := self.process(name)):
            raise SandboxError(
                f"{name} died while starting; {self._tail(name)}\n"
                f"Next: mend what the log names, then run stop and start (start chooses new ports)"
            )
        say(f"{name} up (pid {process.pid}, {self.address(name)})")

    def address(self, name: str) -> str:
        port = self.folder.ports.get(name)
        return f"port {port}" if port else f"socket {self.folder.munge_socket}"

    def _tail(self, name: str) -> str:
        log = self.folder.log(name)
        lines = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
        return "\n".join([f"the end of {log}:", *(f"    {line}" for line in lines or ["(empty)"])])

    def install(self) -> None:
        """Write every file the daemons read."""
        root, password = self.folder.root, secrets.token_hex(16)
        _write(self.folder.conf, config.slurm_conf(self.folder), 0o644)
        _write(root / "gres.conf", config.gres_conf(self.folder), 0o644)
        if self.folder.settings.enforce_memory:
            cgroups.make(root)
            _write(root / "cgroup.conf", config.cgroup_conf(self.folder, cgroups.limits_swap(root)), 0o644)
        _write(root / "munge.key", secrets.token_bytes(128), 0o400)
        for i in range(config.GPUS_PER_NODE):
            _make_device(root / "dev" / f"nvidia{i}")
        if not self.folder.settings.accounting:
            return
        _write(root / "slurmdbd.conf", config.slurmdbd_conf(self.folder, password), 0o600)
        _write(root / "accounts.sql", config.accounts_sql(password), 0o600)
        installer = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={root}/db", *_MARIADB]
        options = ["--auth-root-authentication-method=normal", "--skip-test-db"]
        with self.folder.log("mariadb-install-db").open("wb") as log:
            done = subprocess.run(
                [*installer, *options],
                check=False,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if done.returncode:
            raise SandboxError(f"MariaDB could not make its data folder {root}/db; {self._tail('mariadb-install-db')}")
        say("database made")

    def bring_up(self) -> None:
        """Start every daemon that is down, and return once all of them answer."""
        names = self.folder.settings.daemons
        nodes = self.folder.settings.node_names
        for name in names:
            if self.process(name):
                continue
            self.launch(name)
            if name not in nodes:  # the nodes come up together, below
                self.await_answer(name)
        for name in nodes:
            self.await_answer(name)
        if self.folder.settings.accounting:
            port = str(self.folder.ports["slurmctld"])
            if not processes.wait_until(lambda: self._registered_clusters().get(config.CLUSTER) == port, _PATIENCE):
                raise SandboxError(f"slurmctld did not register with slurmdbd; {self._tail('slurmctld')}")
            probe = subprocess.run(
                ["sacct", "-X"], check=False, env=self.environment, capture_output=True, text=True, timeout=60
            )
            if probe.returncode:
                raise SandboxError(f"sacct does not work: {probe.stderr.strip()}; {self._tail('slurmdbd')}")

    def take_down(self) -> None:
        """Stop every process of the sandbox, jobs included; whatever depends on another goes first."""
        names = self.folder.settings.daemons
        for group in (["slurmctld", *self.folder.settings.node_names], ["jobs"], ["slurmdbd"], ["mariadbd", "munged"]):
            if group == ["jobs"]:
                kept = {self.process(name) for name in names}
                processes.stop([process for process in self._marked() if process not in kept], grace=2)
            else:
                processes.stop([process for name in group if (process := self.process(name))], grace=_GRACE)
        # Whatever was just being forked during the first look, and orphans without a record.
        while left := self._marked():
            processes.stop(left, grace=2)
        if self.folder.settings.enforce_memory:
            cgroups.remove(self.folder.root)

    def _marked(self) -> list[Process]:
        return processes.marked(self.folder.root, self.folder.conf)


def _write(path: Path, content: str | bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)


def _make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        path.touch()  # a container without CAP_MKNOD; Slurm only asks that the file is there


def start(root: Path, settings: Settings) -> Folder:
    if os.geteuid() != 0:
        raise SandboxError(
            "the sandbox's slurmd and slurmctld must run as root; run as root, for example in a container"
        )
    packages.ensure_installed(settings.accounting)
    with folders.locked(root):
        folder = folders.load(root)
        if folder and folder.ready.exists():
            cluster = Cluster(folder)
            down = [name for name in folder.settings.daemons if not cluster.process(name)]
            if len(down) < len(folder.settings.daemons):
                if folder.settings != settings:
                    raise SandboxError(f"{root} is up with {folder.settings}, asked for {settings}; run stop first")
                say(f"restarting {', '.join(down)}" if down else f"already up in {root}")
                cluster.bring_up()
                return folder
        if folder:
            say(f"clearing what an earlier start left in {root}")
            Cluster(folder).take_down()
            folder.remove(keep_logs=False)
        folder = folders.create(root, settings)
        cluster = Cluster(folder)
        try:
            cluster.install()
            cluster.bring_up()
        except SandboxError:
            cluster.take_down()  # the files stay for a look; the next start clears them
            raise
        folder.ready.touch()
        say(f"{settings.nodes} nodes idle in {root}")
        return folder


def stop(root: Path, keep_logs: bool) -> None:
    if not root.is_dir():
        say(f"nothing to stop: {root} does not exist")
        return
    with folders.locked(root):
        folder = folders.load(root)
        if not folder:
            say(f"nothing to stop in {root}")
            return
        Cluster(folder).take_down()
        folder.remove(keep_logs)
        say(f"stopped{f', logs kept in {root}/logs' if keep_logs else ''}")


def status(root: Path) -> bool:
    """Print a line per daemon and sinfo; say whether all are up."""
    folder = folders.load(root) if root.is_dir() else None
    if not folder:
        print(f"down: no sandbox in {root}")
        return False
    cluster = Cluster(folder)
    up = {name: cluster.process(name) for name in folder.settings.daemons}
    lines = [
        f"{name:<10} {'up' if process else 'down':<5} pid {process.pid if process else '-':<8} {cluster.address(name)}"
        for name, process in up.items()
    ]
    if up["slurmctld"]:
        lines.append(cluster.ask("sinfo").rstrip() or f"sinfo does not answer; see {folder.log('slurmctld')}")
    print("\n".join(lines))
    return all(up.values())


def _named(root: Path, name: str) -> Cluster:
    folder = folders.load(root) if root.is_dir() else None
    if not folder:
        raise SandboxError(f"no sandbox in {root}; run start first")
    if name not in folder.settings.daemons:
        raise SandboxError(f"{root} has no daemon {name!r}; it has {', '.join(folder.settings.daemons)}")
    return Cluster(folder)


def stop_daemon(root: Path, name: str, kill: bool, with_jobs: bool) -> None:
    cluster = _named(root, name)
    with folders.locked(root):
        if process := cluster.process(name):
            if kill:
                process.signal(signal.SIGKILL)
            processes.stop([process], grace=_GRACE)
        if with_jobs:
            # Without mercy: this stands for a node that lost its power.
            for process in (jobs := processes.marked(root, cluster.folder.conf, node=name)):
                process.signal(signal.SIGKILL)
            processes.stop(jobs, grace=_GRACE)
        say(f"{name} down")


def start_daemon(root: Path, name: str) -> None:
    cluster = _named(root, name)
    with folders.locked(root):
        if not cluster.process(name):
            cluster.launch(name)
        # Only slurmctld can tell how a node does.
        if name not in cluster.folder.settings.node_names or cluster.process("slurmctld"):
            cluster.await_answer(name)
