"""ultrafeedback: three iterations of AIPO on the prompts of UltraFeedback, with PairRM as the ranker.

Sampling, filters and optimization are the paper's (Shen et al. 2024, arXiv 2409.08845): five candidates at temperature 0.4,
best against worst, AIPO with alpha 0.09, lambda 0.5, beta 0.1, batch 256, learning rate 5e-7 for one epoch; 20,000 prompts
an iteration. The paper draws new prompts by self-instruct; here they are UltraFeedback's own, a different part each time.
Nodes are of eight 80 GB GPUs; change the resources to yours.
"""

from aipo_hpc.recipe import Recipe
from aipo_hpc.resources import Resources
from aipo_hpc.stages.evaluate import EvaluateConfig
from aipo_hpc.stages.generate import GenerateConfig
from aipo_hpc.stages.pairs import PairsConfig
from aipo_hpc.stages.prompts import PromptsConfig
from aipo_hpc.stages.rank import RankConfig
from aipo_hpc.stages.reference import ReferenceConfig
from aipo_hpc.stages.train import TrainConfig


def recipe() -> Recipe:
    """The settings of the run."""
    return Recipe(
        name="ultrafeedback",
        model_name_or_path="mistralai/Mistral-Nemo-Instruct-2407",
        prompts="HuggingFaceH4/ultrafeedback_binarized",
        iterations=3,
        cluster="slurm",
        data=PromptsConfig(split="train_prefs", num_held_out=512),
        generate=GenerateConfig(
            engine="vllm",
            n=5,
            num_prompts=20_000,
            num_shards=32,
            temperature=0.4,
            top_p=1.0,
            top_k=50,
            max_tokens=2048,
            max_prompt_tokens=512,
            resources=Resources(gpus_per_node=1, cpus_per_task=8, time=240),
        ),
        rank=RankConfig(
            model_name_or_path="llm-blender/PairRM", resources=Resources(gpus_per_node=1, cpus_per_task=8, time=120)
        ),
        pairs=PairsConfig(max_prompt_tokens=512, max_response_tokens=2016, drop_url_in_chosen=True),
        reference=ReferenceConfig(num_shards=16, resources=Resources(gpus_per_node=1, cpus_per_task=8, time=120)),
        train=TrainConfig(
            loss_type="aipo",
            beta=0.1,
            alpha=0.09,
            lambda_=0.5,
            learning_rate=5e-7,
            num_train_epochs=1,
            global_batch_size=256,
            per_device_train_batch_size=2,
            warmup_ratio=0.1,
            zero_stage=3,
            resources=Resources(nodes=2, tasks_per_node=8, gpus_per_node=8, cpus_per_task=8, time=720),
        ),
        evaluate=EvaluateConfig(
            temperature=0.7, num_shards=4, resources=Resources(gpus_per_node=1, cpus_per_task=8, time=60)
        ),
    )
