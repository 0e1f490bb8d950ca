"""Supervised fine-tuning on TRL's ``SFTTrainer``, with the metrics file of all trainings."""

from pathlib import Path
from typing import Any

from trl.trainer.sft_trainer import SFTTrainer

from aipo_hpc.metrics_file import MetricsFile


class ConversationTrainer(MetricsFile, SFTTrainer):
    """SFTTrainer on rows of ``input_ids`` and ``labels``; the loss is a mean over the learnt tokens of the global batch."""

    def __init__(self, *, metrics_path: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metrics_path = metrics_path
