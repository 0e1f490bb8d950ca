"""Checks before anything is submitted: models are there and fit to chat; hub names become local folders.

Models are fetched (or found in the cache) where the run is launched, so compute nodes need no network, and what a run uses
is pinned to what was there at its launch.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from aipo_hpc import own_code, sources
from aipo_hpc.benchmarks import read_questions
from aipo_hpc.chat import refuse_other_tokens
from aipo_hpc.chat_templates import make_templated_folder
from aipo_hpc.errors import DataError
from aipo_hpc.graph import Edge, Graph, Job
from aipo_hpc.identity import looks_local
from aipo_hpc.outside import Outside
from aipo_hpc.rankers.config import RANKERS, models
from aipo_hpc.store import Run


def resolve(graph: Graph) -> Graph:
    """The graph with every outside input checked and given as an absolute local path (datasets of the hub as they are).

    Raises DataError for what is missing or cannot be used.
    """
    known: dict[tuple[str, Outside], Outside] = {}

    def resolved(job: Job, name: str, source: Edge | Outside) -> Edge | Outside:
        if isinstance(source, Edge):
            return source
        kind = _kind(job, name)
        if (kind, source) not in known:
            known[kind, source] = dataclasses.replace(source, value=_check(kind, source))
        return known[kind, source]

    def with_inputs(job: Job) -> Job:
        return dataclasses.replace(
            job, inputs={name: resolved(job, name, source) for name, source in job.inputs.items()}
        )

    found = dataclasses.replace(graph, jobs={name: with_inputs(job) for name, job in graph.jobs.items()})
    _trust(found)
    _check_references(found)
    return found


def _trust(graph: Graph) -> None:
    """Let this process run the code of the models for which the recipe asks."""
    for job in graph.jobs.values():
        for source in job.inputs.values():
            if isinstance(source, Outside) and source.trust_remote_code:
                own_code.trust(source.value)


def _check_references(graph: Graph) -> None:
    """A reference of its own reads ids as the policy does; told here, where both are from outside."""
    for job in graph.jobs.values():
        reference, policy = job.inputs.get("reference"), job.inputs.get("policy")
        if isinstance(reference, Outside) and isinstance(policy, Outside) and reference.value != policy.value:
            refuse_other_tokens(policy.value, reference.value)


def _kind(job: Job, name: str) -> str:
    """What an outside input is checked as: policy, reference, source, ranker, chat ranker, embedder, questions of ..."""
    if name == "questions":
        return f"{_QUESTIONS}{job.config.name}"
    if name.endswith(".questions"):
        return f"{_QUESTIONS}{name.removesuffix('.questions')}"
    if name == "ranker" or name.startswith("ranker."):
        single = models(job.config)[name]
        return "chat ranker" if RANKERS[single.ranker].chat else "ranker"
    return name


_QUESTIONS = "questions of "


def with_templates(graph: Graph, run: Run) -> Graph:
    """A resolved graph in which each model that is used with a template of the recipe's is a folder of the run with it."""

    def templated(source: Edge | Outside) -> Edge | Outside:
        if isinstance(source, Edge) or source.chat_template is None:
            return source
        folder = run.templated_model(hashlib.sha256(f"{source.identity} {source.value}".encode()).hexdigest()[:12])
        make_templated_folder(Path(source.value), source.chat_template, folder)
        return dataclasses.replace(source, value=str(folder.resolve()), chat_template=None)

    jobs = {
        name: dataclasses.replace(job, inputs={key: templated(source) for key, source in job.inputs.items()})
        for name, job in graph.jobs.items()
    }
    made = dataclasses.replace(graph, jobs=jobs)
    _trust(made)
    return made


def _check(kind: str, source: Outside) -> str:
    if kind.startswith(sources.KIND):
        return str(sources.parse(source.value).absolute())
    if kind.startswith(_QUESTIONS):
        path = Path(source.value).expanduser()
        read_questions(kind.removeprefix(_QUESTIONS), path)
        return str(path.resolve())
    folder = _folder(kind, source)
    if not (folder / "config.json").is_file():
        raise DataError(f"{kind} {source.value!r}: no config.json in {folder}. Give the folder of a saved model.")
    _check_code(kind, source, folder)
    _check_weights(folder)
    if kind in ("policy", "chat ranker") and source.chat_template is None:
        _check_chat_template(folder)
    return str(folder)


def _folder(kind: str, source: Outside) -> Path:
    path = Path(source.value).expanduser()
    if path.is_dir():
        return path.resolve()
    if looks_local(source.value):
        raise DataError(
            f"{kind} {source.value!r}: no such folder as {path.absolute()}. Give a model's folder or hub name."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.value, revision=source.revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{kind} {source.value!r}: not a folder here, and the hub does not give it: {error}\n"
            "Give the path of a local folder, or fetch it first where there is a network "
            f"(hf download {source.value}) and set HF_HOME to that cache."
        ) from error


def _check_code(kind: str, source: Outside, folder: Path) -> None:
    """A model of a kind that transformers does not know is nothing without its own code."""
    config = _read_json(folder / "config.json")
    if source.trust_remote_code or not isinstance(config, dict) or not config.get("auto_map"):
        return
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        raise DataError(own_code.needed(kind, source.value))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Copy or download it again.") from error


def _check_weights(folder: Path) -> None:
    """All files of weights are there and whole, as far as their headers and sizes tell."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(_read_json(index).get("weight_map", {}).values())
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise DataError(f"{folder}: {missing[0]} is missing, which {index.name} names. Copy or download it again.")
        weights = [folder / name for name in sorted(names)]
    else:
        weights = sorted(folder.glob("*.safetensors"))
    if not weights and not list(folder.glob("pytorch_model*.bin")):
        raise DataError(f"{folder}: no weights (*.safetensors) in it. Copy or download the whole model.")
    for path in weights:
        _check_tensors(path)


def _check_tensors(path: Path) -> None:
    """A safetensors file is as long as its header says: eight bytes of length, the header in JSON, the tensors."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
        stated = (
            8
            + length
            + max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a safetensors file ({error}). Copy or download it again.") from error
    if size != stated:
        raise DataError(f"{path}: has {size} bytes, its header states {stated}. Copy or download it again.")


def _check_chat_template(folder: Path) -> None:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{folder}: no readable tokenizer_config.json ({error}). Save the tokenizer beside the model."
        ) from error
    if not settings.get("chat_template"):
        raise DataError(
            f"{folder}: its tokenizer has no chat template, so it is not known how a prompt is put to this model. "
            "Use an instruction-tuned model, or add chat_template.jinja to the folder."
        )
