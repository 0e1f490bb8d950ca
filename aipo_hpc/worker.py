"""The worker: one shard of one job, on whatever node it was sent to.

It trusts no dependency of the scheduler: it checks the sentinels and payloads of its inputs itself, runs the stage, and
publishes the shard's sentinel last. Whatever goes wrong is recorded with its class and raised again.
"""

import atexit
import os
import platform
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aipo_hpc import gang, leaving, own_code
from aipo_hpc.claims import Claims, NothingLeft, is_shared
from aipo_hpc.durable import hash_file
from aipo_hpc.errors import InputNotVisible, RunError
from aipo_hpc.failures import blames_another, classify, deaths
from aipo_hpc.job_folder import JobFolder
from aipo_hpc.memory_kills import memory_kills
from aipo_hpc.sentinel import Blame, Failure, Output, Sentinel
from aipo_hpc.settings import from_plain, with_smaller_batches
from aipo_hpc.stage_table import STAGES
from aipo_hpc.store import Run
from aipo_hpc.task import Input, Outcome, Place, Task
from aipo_hpc.versions import used_versions


@dataclass(frozen=True)
class Envelope:
    """All that a worker is told; the rest is in the job's folder."""

    run_dir: str
    job: str
    shard: int
    submission: str
    index: int
    fence: int
    batch_divisor: int = 1
    """By how much the stage's batches are smaller than the recipe says, after it ran out of memory."""
    extra: bool = False
    """Whether it is to do part of a shard that another task is doing, and that is the other's to finish."""

    @property
    def attempt(self) -> str:
        """Name of this attempt, the same in all processes of a gang; a requeued task gets another."""
        return f"{self.submission}.{self.index}.r{os.environ.get('SLURM_RESTART_COUNT', '0')}"

    def run(self) -> None:
        """Execute the shard; a failure is recorded and raised."""
        run = Run(Path(self.run_dir))
        started = time.time()
        place = Place()
        kills = memory_kills()
        try:
            place = gang.join()
            execute(run, self, place)
        except leaving.Left:
            raise
        except Exception as error:
            if leaving.ending() or (place.world_size > 1 and blames_another(error)):
                raise  # the scheduler knows why, and whether that was a failure
            starved = memory_kills() > kills
            why = "; the kernel killed a process of this task for want of memory" if starved else ""
            folder = run.job(self.job)
            folder.record_failure(
                Failure(
                    job=self.job,
                    shard=self.shard,
                    attempt=self.attempt,
                    fence=self.fence,
                    kind=classify(error, starved),
                    message=f"{type(error).__name__}: {error}{why}",
                    traceback=traceback.format_exc()[-8000:],
                    host=platform.node(),
                    log=log_path(folder, place),
                    time=time.time(),
                    node=os.environ.get("SLURMD_NODENAME", ""),
                    seconds=time.time() - started,
                    progressed=folder.advanced(self.shard, f"{self.submission}.{self.index}"),
                    blames=error.blames if isinstance(error, InputNotVisible) else (),
                    extra=self.extra,
                )
            )
            raise


def execute(run: Run, envelope: Envelope, place: Place) -> None:
    """Do the work of the shard, unless it is done."""
    folder = run.job(envelope.job)
    job = folder.read_job()
    if job is None:
        raise RunError(f"{folder.path}: no readable job.json. Type the launch command again: it writes it anew.")
    if envelope.shard in folder.done(job["fingerprint"], only=(envelope.shard,)):
        print(f"{envelope.job} shard {envelope.shard}: is done already", flush=True)
        return
    if envelope.extra and not is_shared(folder, envelope.shard):
        print(f"{envelope.job} shard {envelope.shard}: nobody is at work on it whom to join", flush=True)
        return
    started = time.time()
    inputs, lineage = resolve_inputs(run, job, envelope.shard)
    for name, source in job["inputs"].items():
        if source.get("trust_remote_code"):
            own_code.trust(inputs[name].model)
    out, earlier = folder.begin_attempt(envelope.shard, envelope.attempt)
    died = deaths(folder.failures(), envelope.shard, [path.name for path in earlier])
    use_private_caches()
    stage = STAGES[job["stage"]]
    config = with_smaller_batches(from_plain(stage.config, job["settings"]), envelope.batch_divisor)
    if (resources := getattr(config, "resources", None)) is not None:
        # Libraries take one thread per core of the machine, also where only a few of them are this task's.
        os.environ.setdefault("OMP_NUM_THREADS", str(resources.cpus_per_task))
    claims: Claims | None = None
    if hasattr(config, "share_after") and envelope.fence > 0:  # nobody tells of attempts by hand whether they are over
        claims = Claims(folder, envelope.shard, envelope.attempt, job["fingerprint"], envelope.extra)
    task = Task(
        job=envelope.job,
        iteration=job["iteration"],
        shard=envelope.shard,
        num_shards=job["num_shards"],
        seed=job["seed"],
        inputs=inputs,
        out=out,
        earlier=earlier,
        deaths=tuple(path for path in earlier if path.name in died),
        claims=claims,
    )
    try:
        outcome: Outcome = stage.module.run(config, task)
        if claims is not None and claims.extra:  # every row was there when it came
            claims.leave()
    except NothingLeft as nothing:
        print(nothing, flush=True)
        return
    if place.rank != 0:
        return
    sentinel = Sentinel(
        job=envelope.job,
        shard=envelope.shard,
        fingerprint=job["fingerprint"],
        attempt=envelope.attempt,
        fence=envelope.fence,
        rows=outcome.rows,
        outputs=tuple(describe(out, name) for name in outcome.outputs),
        inputs=lineage,
        counts=dict(outcome.counts),
        started=started,
        ended=time.time(),
        host=platform.node(),
        scheduler=scheduler_ids(),
        gpus=gpu_models(),
        num_processes=place.world_size,
        versions=used_versions(),
    )
    first = folder.publish(sentinel)
    if claims is not None:
        claims.remove()
    print(f"{envelope.job} shard {envelope.shard}: {'done' if first else 'another attempt was first'}", flush=True)


def resolve_inputs(run: Run, job: Mapping[str, Any], shard: int) -> tuple[dict[str, Input], dict[str, Any]]:
    """Find and check the inputs of a shard; also tell their lineage.

    Raises InputNotVisible when a sentinel or a payload is not there within the bounded wait.
    """
    inputs: dict[str, Input] = {}
    lineage: dict[str, Any] = {}
    timeout = float(job["payload_timeout"])
    for name, source in job["inputs"].items():
        if "job" not in source:
            inputs[name] = Input(value=source["value"])
            lineage[name] = {"identity": source["identity"]}
            continue
        needed = [shard] if source["by"] == "shard" else list(range(source["num_shards"]))
        upstream = run.job(source["job"])
        sentinels = wait_for_sentinels(upstream, source["fingerprint"], needed, timeout)
        inputs[name] = Input(shards=wait_for_payloads(upstream, sentinels, source["part"], timeout))
        lineage[name] = {"job": source["job"], "sentinels": [sentinels[each].digest for each in needed]}
    return inputs, lineage


def wait_for_sentinels(upstream: JobFolder, fingerprint: str, needed: list[int], timeout: float) -> dict[int, Sentinel]:
    """The sentinels of the needed shards, waiting a bounded time for a file system that shows them late."""
    deadline = time.monotonic() + timeout
    wanted = frozenset(needed)
    while True:
        done = upstream.done(fingerprint, only=wanted)
        missing = [each for each in needed if each not in done]
        if not missing:
            return done
        if time.monotonic() > deadline:
            raise InputNotVisible(
                f"{upstream.path}: no valid sentinel of shards {missing[:10]} is visible on {platform.node()} after "
                f"{timeout:g} s, so this task will not start on its work. {'; '.join(upstream.reports[:3])}",
                tuple(Blame(upstream.name, each) for each in missing),
            )
        time.sleep(0.5)


def wait_for_payloads(
    upstream: JobFolder, sentinels: Mapping[int, Sentinel], part: str, timeout: float
) -> dict[int, tuple[Path, ...]]:
    """The output files of these shards; all that stay invisible for the bounded wait are told in one error."""
    deadline = time.monotonic() + timeout
    files: dict[int, tuple[Path, ...]] = {}
    errors: list[InputNotVisible] = []
    for shard, sentinel in sorted(sentinels.items()):
        try:
            files[shard] = upstream.wait_for_payload(sentinel, part, timeout, deadline)
        except InputNotVisible as error:
            errors.append(error)
    if errors:
        message = "\n".join(str(error) for error in errors[:5])
        more = f"\n... and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise InputNotVisible(message + more, tuple(blame for error in errors for blame in error.blames))
    return files


def describe(out: Path, name: str) -> Output:
    """Size and hash of an output file, which is made durable first."""
    path = out / name
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return Output(name, path.stat().st_size, hash_file(path))


def scheduler_ids() -> dict[str, str]:
    """Slurm's ids of this task, or submitit's pid of a local one."""
    names = (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_RESTART_COUNT",
        "SLURM_JOB_NODELIST",
        "SLURMD_NODENAME",
    )
    return {name.lower(): os.environ[name] for name in (*names, "SUBMITIT_LOCAL_JOB_ID") if name in os.environ}


def gpu_models() -> tuple[str, ...]:
    """Models of the GPUs that this task may use."""
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if not visible or shutil.which("nvidia-smi") is None:
        return ("unknown",) * len(visible)
    shown = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", f"--id={','.join(visible)}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return tuple(line.strip() for line in shown.stdout.splitlines()) if shown.returncode == 0 else ("unknown",)


def use_private_caches() -> None:
    """Give compilers caches on the node's own disk: tasks that start together clobber each other's in a shared home."""
    base = Path(tempfile.gettempdir()) / f"aipo_hpc-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise RunError(
            f"{base}: belongs to somebody else, and compiled code is kept there. Set TMPDIR to a folder of yours."
        )
    own = Path(tempfile.mkdtemp(prefix="task-", dir=base))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, str(own / name.lower()))
    # Compiled once per node and reused: DeepSpeed's small extension takes half a minute to build.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(base / "torch_extensions"))


def log_path(folder: JobFolder, place: Place) -> str:
    """Where submitit keeps what this task printed."""
    job, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    task = f"{job}_{element}" if job else os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID")
    return str(folder.logs / f"{task}_{place.rank}_log.out") if task else ""
