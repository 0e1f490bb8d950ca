"""sppo: self-play preference optimization with PairRM.

Source: Wu et al. 2024, arXiv 2405.00675, and uclaml/SPPO (run_sppo_mistral.sh, scripts/pipeline.sh, scripts/generate.py,
recipes/zephyr-7b-beta/dpo/config_full.yaml). Copied from them: Mistral-7B-Instruct-v0.2; three iterations, each on another
third of the prompts of UltraFeedback; five candidates at temperature 0.7, top_p 0.9, at most 2048 tokens; the best against
the worst by PairRM; beta 0.001 (the paper's eta is 1 / beta = 1000), learning rate 5e-7, linear, 10 % warm-up, batch 64 (8 on
each of 8 GPUs), one epoch an iteration. Different here: win probabilities are 1 and 0 (sppo_hard) instead of PairRM's
estimates, AdamW takes the place of RMSProp, and no sequence is cut to 1024 tokens.
"""

from dataclasses import replace

from aipo_hpc.recipe import Recipe, load_recipe


def recipe() -> Recipe:
    """The settings of the run."""
    base = load_recipe("ultrafeedback")
    return replace(
        base,
        name="sppo",
        model_name_or_path="mistralai/Mistral-7B-Instruct-v0.2",
        iterations=3,
        generate=replace(base.generate, n=5, num_prompts=20_000, temperature=0.7, top_p=0.9, top_k=0, max_tokens=2048),
        pairs=replace(base.pairs, drop_url_in_chosen=False),
        train=replace(
            base.train,
            loss_type="sppo_hard",
            beta=0.001,
            learning_rate=5e-7,
            lr_scheduler_type="linear",
            global_batch_size=64,
            resources=replace(base.train.resources, nodes=1),
        ),
    )
