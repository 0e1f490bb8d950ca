"""ultrafeedback-self_instruct-pair_rm: AIPO as in the paper's main comparison, each iteration on prompts of the policy's own.

Source: Shen et al. 2024, arXiv 2409.08845, and the configuration of that name in bytedance/AIPO. Copied from the paper:
Mistral-Nemo-Instruct-2407; ten iterations of 20,000 new prompts by self-instruct (eight seeds of UltraFeedback, temperature
0.5, top_p 0.9, top_k 50, at most 1024 tokens and two tasks a call, 4 to 512 tokens a task); five candidates at temperature
0.4, best against worst by PairRM; AIPO with alpha 0.09, lambda 0.5, beta 0.1, batch 256, learning rate 5e-7, one epoch. For
seeds by cluster, which the original can draw as well, set clusters.num_clusters=256 instruct.num_per_cluster=100.
"""

from dataclasses import replace

from aipo_hpc.recipe import Recipe, load_recipe
from aipo_hpc.stages.instruct import InstructConfig


def recipe() -> Recipe:
    """The settings of the run."""
    base = load_recipe("ultrafeedback")
    return replace(
        base,
        name="ultrafeedback-self_instruct-pair_rm",
        iterations=10,
        instruct=InstructConfig(
            num_prompts=20_000,
            num_shards=16,
            num_seeds=8,
            num_machine_seeds=0,
            tasks_per_call=2,
            temperature=0.5,
            top_p=0.9,
            top_k=50,
            max_tokens=1024,
            min_task_tokens=4,
            max_task_tokens=512,
            resources=replace(base.generate.resources, time=120),
        ),
        generate=replace(base.generate, num_prompts=None),
    )
