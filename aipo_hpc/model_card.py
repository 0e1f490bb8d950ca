"""The card of a trained model: README.md with the front matter that the Hugging Face hub reads, made of a manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aipo_hpc.identity import looks_local

CARD = "README.md"


def model_card(manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The text of the card; ``recipe`` is the resolved recipe. Only names on the hub, never local paths, go to the front."""
    from huggingface_hub import ModelCardData

    base, prompts = str(recipe["model_name_or_path"]), str(recipe["prompts"])
    train = manifest["stages"]["train"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["aipo_hpc", "preference-optimization", str(train["settings"].get("loss_type", train["stage"]))],
        base_model=None if looks_local(base) else base,
        datasets=None if looks_local(prompts) else [prompts],
    )
    sections = (
        _title(manifest),
        _numbers(manifest),
        _lineage(manifest, base, prompts),
        _settings(train),
        _made_with(manifest),
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _title(manifest: Mapping[str, Any]) -> str:
    return (
        f"# {manifest['recipe']}, iteration {manifest['iteration'] + 1}\n\n"
        f"Trained by aipo_hpc (run {manifest['run_id']}, seed {manifest['seed']}): iterative preference optimization, in which "
        "a policy answers prompts, a ranker orders the answers, and the policy is trained on the best against the worst. "
        "The licence of the base model applies."
    )


def _numbers(manifest: Mapping[str, Any]) -> str:
    found = manifest["evaluation"]
    if not found:
        return "Not evaluated."
    lines = [
        f"| win rate against the initial policy | {_rate(found, 'win_rate')} |",
        f"| ... at equal lengths | {_rate(found, 'length_controlled_win_rate')} |",
        f"| better, same, worse | {found['wins']:g}, {found['ties']:g}, {found['losses']:g} |",
        f"| mean response length, and the initial policy's (characters) | {found['mean_length']:.1f}, "
        f"{found['baseline_mean_length']:.1f} |",
    ]
    return "## Evaluation\n\nOn held-out prompts, judged by the run's ranker.\n\n| | |\n|---|---|\n" + "\n".join(lines)


def _rate(found: Mapping[str, float], name: str) -> str:
    if name not in found:
        return "not determined"
    error = f" ± {100 * found[f'{name}_se']:.1f}" if f"{name}_se" in found else ""
    return f"{100 * found[name]:.1f} %{error}"


def _lineage(manifest: Mapping[str, Any], base: str, prompts: str) -> str:
    rows = [f"| initial policy | {_public(base)} |", f"| prompts | {_public(prompts)} |"]
    for name, source in manifest["outside"].items():
        told = f"revision {source['revision']}, " if source["revision"] else ""
        rows.append(f"| {name}, from outside the run | {told}{source['identity']} |")
    for name, stage in manifest["stages"].items():
        taken = ", ".join(f"{number} rows of {taken}" for taken, number in stage["rows_in"].items()) or "outside inputs"
        rows.append(f"| {name} | {taken} -> {stage['rows']} rows |")
    rows.append(f"| weights | sha256 {manifest['model']['sha256']} |")
    return "## Lineage\n\n| | |\n|---|---|\n" + "\n".join(rows)


def _public(name: str) -> str:
    """A name on the hub as it is; of a path only the last part, since a card may leave the place it was made at."""
    return f"{Path(name).name} (local)" if looks_local(name) else name


def _settings(train: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in train["settings"].items() if name != "resources"}
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| `{name}` | {value} |" for name, value in plain.items())


def _made_with(manifest: Mapping[str, Any]) -> str:
    versions = manifest["stages"]["train"]["versions"]
    hours = f"{manifest['gpu_hours']:.2f} GPU-hours, {manifest['task_hours']:.2f} task-hours"
    return f"## Made with\n\n{hours} in this iteration. " + ", ".join(
        f"{name} {each}" for name, each in versions.items()
    )
