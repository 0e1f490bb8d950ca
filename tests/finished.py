"""A finished run whose stages have several batches in each of two shards, and copies of it in which some is undone."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from aipo_hpc.launch import launch
from aipo_hpc.recipe import Recipe, load_recipe
from aipo_hpc.record import read_graph
from aipo_hpc.sentinel import Sentinel
from aipo_hpc.store import JOURNAL, Run

PROMPTS_PER_CALL = 4
"""What its ranker was given at once: a ranker's scores depend on that in the last digits."""


def recipe(folder: Path) -> Recipe:
    """Its recipe: an iteration with eleven prompts a shard."""
    demo = load_recipe("demo")
    return replace(
        demo,
        cluster="inline",
        run_dir=str(folder),
        iterations=1,
        poll_seconds=0.05,
        data=replace(demo.data, limit=24, num_held_out=2),
        generate=replace(demo.generate, n=2, max_tokens=8, num_shards=2, batch_size=3),
        reference=replace(demo.reference, num_shards=2, tokens_per_batch=256),
        train=replace(demo.train, num_train_epochs=1, global_batch_size=8, per_device_train_batch_size=4),
    )


def finish_run(folder: Path) -> Path:
    """Make the run in ``folder``, in this process, with one thread as a task of one core has."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("aipo_hpc.rankers.pairrm.PairRM.prompts_per_call", PROMPTS_PER_CALL)
            return launch(recipe(folder)).path
    finally:
        torch.set_num_threads(threads)


def unfinished(finished: Path, folder: Path, *shards: tuple[str, int]) -> tuple[Run, list[Sentinel]]:
    """A copy in which these shards are not done, and without what they left; also their sentinels as they were.

    It has no journal: another cluster would be asked in vain for what was sent to this one.
    """
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(JOURNAL))
    run = Run(folder)
    graph = read_graph(run)
    before = []
    for job, shard in shards:
        before.append(run.job(job).done(graph.fingerprints[job])[shard])
        run.job(job).retract(shard)
        shutil.rmtree(run.path / job / f"shards/{shard:05d}")
    return run, before
