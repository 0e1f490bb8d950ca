"""ultrafeedback-offline: preference training on UltraFeedback's own pairs; nothing is sampled. AIPO's recipe ``ultrafeedback``.

Source: the configuration of that name in bytedance/AIPO. Copied from it: Mistral-7B-Instruct-v0.2 with the chat template
mistral-instruct, three iterations (MAX_ITER=2) over the same pairs, each from the model before with that model as the
reference, plain DPO with beta 0.1, a global batch of 32, learning rate 5e-7 with a cosine and 10 % warm-up, one epoch.
"""

from dataclasses import replace

from aipo_hpc.recipe import Recipe, load_recipe
from aipo_hpc.stages.preferences import PreferencesConfig


def recipe() -> Recipe:
    """The settings of the run."""
    return replace(
        load_recipe("ultrafeedback-pair_rm"),
        name="ultrafeedback-offline",
        preferences=PreferencesConfig(source="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs"),
    )
