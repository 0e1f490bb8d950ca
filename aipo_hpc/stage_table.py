"""The table of stages: each kind of job with its settings, and by them its module, and the version of what it computes.

Modules are named, not imported: a worker imports the one that it runs.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A kind of job: its settings class as ``module:class``, and the version of what the module's ``run`` computes.

    Raise ``version`` when a change of the code changes results: finished work of another version then counts as drift.
    """

    settings: str
    version: int = 1

    @property
    def config(self) -> type[Any]:
        """The settings class."""
        found: type[Any] = resolve_name(self.settings)
        return found

    @property
    def module(self) -> ModuleType:
        """The module, whose ``run(settings, task)`` does a shard."""
        return importlib.import_module(self.settings.partition(":")[0])


STAGES: Mapping[str, Stage] = {
    "prompts": Stage("aipo_hpc.stages.prompts:PromptsConfig"),
    "conversations": Stage("aipo_hpc.stages.conversations:ConversationsConfig"),
    "sft": Stage("aipo_hpc.stages.sft:SftConfig"),
    "clusters": Stage("aipo_hpc.stages.clusters:ClustersConfig"),
    "instruct": Stage("aipo_hpc.stages.instruct:InstructConfig"),
    "collect": Stage("aipo_hpc.stages.collect:CollectConfig"),
    "generate": Stage("aipo_hpc.stages.generate:GenerateConfig"),
    "preferences": Stage("aipo_hpc.stages.preferences:PreferencesConfig"),
    "rank": Stage("aipo_hpc.stages.rank:RankConfig"),
    "kept_out": Stage("aipo_hpc.stages.kept_out:KeptOutConfig"),
    "pairs": Stage("aipo_hpc.stages.pairs:PairsConfig", version=2),
    "reference": Stage("aipo_hpc.stages.reference:ReferenceConfig", version=3),
    "train": Stage("aipo_hpc.stages.train:TrainConfig"),
    "evaluate": Stage("aipo_hpc.stages.evaluate:EvaluateConfig", version=3),
    "benchmark": Stage("aipo_hpc.stages.benchmark:AnswersConfig"),
    "answer_files": Stage("aipo_hpc.stages.answer_files:AnswerFilesConfig"),
}
