"""self_rewarding: the policy judges its own answers and learns from its verdicts by DPO.

Source: Yuan et al. 2024, Self-Rewarding Language Models, arXiv 2401.10020, sections 2 and 3.1.3. Copied from it: four
candidates at temperature 0.7, top_p 0.9; the policy of the iteration as the judge on an additive scale of five points, three
replies sampled alike and averaged; best against worst, ties dropped; DPO with beta 0.1, batch 16, a learning rate that falls
linearly from 1e-6; two iterations; new prompts from eight shown ones at temperature 0.6, top_p 0.9. Different here: the paper
starts from Llama 2 70B that it fine-tunes on instructions and on judging (set conversations.source to do so; its learning
rate for that falls from 5.5e-6 to 1.1e-6 at batch 16), trains with dropout 0.1, ends at a learning rate of 1e-7 where here it
is 0, and takes the checkpoint that Claude 2 likes best. A fixed chat model writes its prompts, where here the policy does;
3,964 and 6,942 pairs came of them, of here 5,000 prompts an iteration. It holds out prompts for GPT-4, where here PairRM
tells the win rate.
"""

from dataclasses import replace

from aipo_hpc.rankers.config import POLICY, JudgeConfig
from aipo_hpc.recipe import Recipe, load_recipe
from aipo_hpc.stages.instruct import InstructConfig


def recipe() -> Recipe:
    """The settings of the run."""
    base = load_recipe("ultrafeedback")
    return replace(
        base,
        name="self_rewarding",
        model_name_or_path="meta-llama/Meta-Llama-3-8B-Instruct",
        iterations=2,
        instruct=InstructConfig(
            num_prompts=5_000,
            num_shards=8,
            num_seeds=8,
            temperature=0.6,
            top_p=0.9,
            top_k=0,
            resources=replace(base.generate.resources, time=60),
        ),
        generate=replace(base.generate, n=4, num_prompts=None, temperature=0.7, top_p=0.9, top_k=0),
        rank=replace(
            base.rank,
            ranker="judge",
            model_name_or_path=POLICY,
            judge=JudgeConfig(num_samples=3, temperature=0.7, top_p=0.9),
        ),
        train=replace(
            base.train,
            loss_type="sigmoid",
            beta=0.1,
            learning_rate=1e-6,
            lr_scheduler_type="linear",
            global_batch_size=16,
            per_device_train_batch_size=2,
            resources=replace(base.train.resources, nodes=1),
        ),
        evaluate=replace(base.evaluate, ranker="pairrm", model_name_or_path="llm-blender/PairRM"),
    )
