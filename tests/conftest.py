"""What tests share: one Slurm, one tiny model and one ranker per session, and a run that is small in every way."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import Clock, chain, write_run
from finished import finish_run
from pairrm_checkpoint import Checkpoint, build_checkpoint
from sandbox import Sandbox, running_sandbox
from tiny_models import tiny_model_folder

from aipo_hpc.graph import Graph
from aipo_hpc.recipe import Recipe, load_recipe
from aipo_hpc.store import Run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # the order of sums decides the last bit
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or bitsandbytes loads the compiler in every process that trains


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run the long forms, marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--runslow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long form: run it with --runslow"))


@pytest.fixture(scope="session")
def slurm_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A real Slurm of four nodes with accounting, for the whole session."""
    with running_sandbox(tmp_path_factory.mktemp("slurm") / "sandbox") as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model's folder."""
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def ranker_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small ranker in both of the published formats, and the base model that llm-blender asks for."""
    return build_checkpoint(tmp_path_factory.mktemp("ranker"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, see ``finished``. Copy it."""
    return finish_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def small_recipe(tmp_path: Path) -> Recipe:
    """The demo on 24 prompts with short answers, in this process."""
    demo = load_recipe("demo")
    return replace(
        demo,
        cluster="inline",
        run_dir=str(tmp_path / "run"),
        poll_seconds=0.05,
        payload_timeout=2.0,
        data=replace(demo.data, limit=24, num_held_out=6),
        generate=replace(demo.generate, n=3, max_tokens=12),
        train=replace(demo.train, num_train_epochs=1, save_steps=1, global_batch_size=8, per_device_train_batch_size=4),
    )


@pytest.fixture
def graph() -> Graph:
    """Three jobs: by shard, and all of them; a test module may have another."""
    return chain()


@pytest.fixture
def run(tmp_path: Path, graph: Graph) -> Run:
    """A run of the graph, with nothing done."""
    return write_run(tmp_path / "run", graph)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time, for driver and journal."""
    return Clock().install(monkeypatch)
