"""simpo: one round of SimPO on the policy's own answers, scored by a reward model.

Source: Meng et al. 2024, arXiv 2405.14734, and its Llama-3-Instruct v0.2 in princeton-nlp/SimPO. Copied from them:
Meta-Llama-3-8B-Instruct; all prompts of UltraFeedback once; five candidates at temperature 0.8, top_p 0.95, at most 4096
tokens; best against worst; beta 10, gamma 3 (gamma/beta 0.3), learning rate 1e-6, cosine, 10 % warm-up, batch 128, one epoch,
prompts of at most 1800 tokens. Different here: the reward model is FsfairX-LLaMA3-RM, a sequence classifier with one logit,
and not ArmoRM, which runs code of its own; and what is longer than training takes is dropped, not cut.
"""

from dataclasses import replace

from aipo_hpc.recipe import Recipe, load_recipe


def recipe() -> Recipe:
    """The settings of the run."""
    base = load_recipe("ultrafeedback")
    return replace(
        base,
        name="simpo",
        model_name_or_path="meta-llama/Meta-Llama-3-8B-Instruct",
        iterations=1,
        generate=replace(
            base.generate,
            n=5,
            num_prompts=None,
            num_shards=64,
            temperature=0.8,
            top_p=0.95,
            top_k=0,
            max_tokens=4096,
            max_prompt_tokens=1800,
        ),
        rank=replace(
            base.rank, ranker="reward_model", model_name_or_path="sfairXC/FsfairX-LLaMA3-RM-v0.1", dtype="bfloat16"
        ),
        pairs=replace(base.pairs, max_prompt_tokens=1800, drop_url_in_chosen=False),
        train=replace(
            base.train,
            loss_type="simpo",
            beta=10.0,
            gamma=3.0,
            learning_rate=1e-6,
            global_batch_size=128,
            resources=replace(base.train.resources, nodes=1),
        ),
    )
