"""ultrafeedback-pair_rm: iterative DPO on the prompts of UltraFeedback, ranked by PairRM; AIPO's recipe of the same name.

Source: the configuration of that name in bytedance/AIPO. Copied from it: Mistral-7B-Instruct-v0.2 with the chat template
mistral-instruct, three iterations (MAX_ITER=2) over all prompts, five candidates at temperature 0.4, plain DPO with beta 0.1,
a global batch of 32, learning rate 5e-7 with a cosine and 10 % warm-up, one epoch. For the loss of the paper set
train.loss_type=aipo, for its batch train.global_batch_size=256.
"""

from dataclasses import replace

from aipo_hpc.recipe import Recipe, load_recipe


def recipe() -> Recipe:
    """The settings of the run."""
    base = load_recipe("ultrafeedback")
    return replace(
        base,
        name="ultrafeedback-pair_rm",
        model_name_or_path="mistralai/Mistral-7B-Instruct-v0.2",
        chat_template="mistral-instruct",
        generate=replace(base.generate, num_prompts=None, num_shards=64),
        train=replace(
            base.train, loss_type="sigmoid", global_batch_size=32, resources=replace(base.train.resources, nodes=1)
        ),
    )
