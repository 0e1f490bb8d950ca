"""demo: two iterations of AIPO on a CPU, in minutes and without a network.

The policy, the ranker and the prompts are small and come with the recipe; `recipes/demo_assets/make.py` makes them again.
Everything else is what runs on a cluster: the same stages, the same files, the same commands.
"""

from pathlib import Path

from aipo_hpc.recipe import Recipe
from aipo_hpc.resources import Resources
from aipo_hpc.stages.evaluate import EvaluateConfig
from aipo_hpc.stages.generate import GenerateConfig
from aipo_hpc.stages.pairs import PairsConfig
from aipo_hpc.stages.prompts import PromptsConfig
from aipo_hpc.stages.rank import RankConfig
from aipo_hpc.stages.reference import ReferenceConfig
from aipo_hpc.stages.train import TrainConfig

ASSETS = Path(__file__).parent / "demo_assets"
ONE_CORE = Resources(cpus_per_task=1, time=30)


def recipe() -> Recipe:
    """The demo's settings."""
    return Recipe(
        name="demo",
        model_name_or_path=str(ASSETS / "policy"),
        prompts=str(ASSETS / "prompts.jsonl"),
        iterations=2,
        cluster="local",
        poll_seconds=0.3,
        data=PromptsConfig(num_held_out=64),
        generate=GenerateConfig(
            engine="transformers",
            n=4,
            num_shards=2,
            temperature=0.9,
            max_tokens=64,
            max_prompt_tokens=448,
            dtype="float32",
            resources=ONE_CORE,
        ),
        rank=RankConfig(model_name_or_path=str(ASSETS / "ranker"), tokens_per_batch=4096, resources=ONE_CORE),
        pairs=PairsConfig(max_prompt_tokens=448, max_response_tokens=64, resources=ONE_CORE),
        reference=ReferenceConfig(num_shards=1, dtype="float32", tokens_per_batch=4096, resources=ONE_CORE),
        train=TrainConfig(
            learning_rate=2e-4,
            num_train_epochs=2,
            global_batch_size=16,
            per_device_train_batch_size=16,
            dtype="float32",
            gradient_checkpointing=False,
            zero_stage=0,
            save_steps=10,
            resources=ONE_CORE,  # so small a model gains nothing from a second one
        ),
        evaluate=EvaluateConfig(temperature=0.7, tokens_per_batch=4096, resources=ONE_CORE),
    )
