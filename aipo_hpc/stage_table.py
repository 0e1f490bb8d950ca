"""The table of stages: each kind of job with its module, its settings and the version of what it computes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aipo_hpc.stages import (
    answer_files,
    benchmark,
    clusters,
    collect,
    conversations,
    evaluate,
    generate,
    instruct,
    kept_out,
    pairs,
    preferences,
    prompts,
    rank,
    reference,
    sft,
    train,
)


@dataclass(frozen=True)
class Stage:
    """A kind of job: its module (settings class and ``run``) and the version of what it computes.

    Raise ``version`` when a change of the code changes results: finished work of another version then counts as drift.
    """

    module: str
    config: type[Any]
    version: int = 1


STAGES: Mapping[str, Stage] = {
    "prompts": Stage("aipo_hpc.stages.prompts", prompts.PromptsConfig),
    "conversations": Stage("aipo_hpc.stages.conversations", conversations.ConversationsConfig),
    "sft": Stage("aipo_hpc.stages.sft", sft.SftConfig),
    "clusters": Stage("aipo_hpc.stages.clusters", clusters.ClustersConfig),
    "instruct": Stage("aipo_hpc.stages.instruct", instruct.InstructConfig),
    "collect": Stage("aipo_hpc.stages.collect", collect.CollectConfig),
    "generate": Stage("aipo_hpc.stages.generate", generate.GenerateConfig),
    "preferences": Stage("aipo_hpc.stages.preferences", preferences.PreferencesConfig),
    "rank": Stage("aipo_hpc.stages.rank", rank.RankConfig),
    "kept_out": Stage("aipo_hpc.stages.kept_out", kept_out.KeptOutConfig),
    "pairs": Stage("aipo_hpc.stages.pairs", pairs.PairsConfig, version=2),
    "reference": Stage("aipo_hpc.stages.reference", reference.ReferenceConfig, version=2),
    "train": Stage("aipo_hpc.stages.train", train.TrainConfig),
    "evaluate": Stage("aipo_hpc.stages.evaluate", evaluate.EvaluateConfig, version=2),
    "benchmark": Stage("aipo_hpc.stages.benchmark", benchmark.AnswersConfig),
    "answer_files": Stage("aipo_hpc.stages.answer_files", answer_files.AnswerFilesConfig),
}
