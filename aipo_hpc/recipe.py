"""A recipe: the typed settings of a whole run, and where recipes are found.

A recipe is a Python file with a function ``recipe() -> Recipe``; a variant is ``dataclasses.replace`` of another. Those that
come with the package are found by name, any other by its path.
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Literal

import tyro

from aipo_hpc import benchmarks
from aipo_hpc.chat_templates import read_template
from aipo_hpc.engines import DTYPES, check_engine
from aipo_hpc.errors import RecipeError
from aipo_hpc.fine_tuning import gradient_accumulation_steps, refuse_missing_packages
from aipo_hpc.guard import GuardConfig
from aipo_hpc.instruct_settings import COUNTS, refuse_missing_libraries, unfit_settings
from aipo_hpc.rankers.config import check_models, check_ranker
from aipo_hpc.resources import Resources
from aipo_hpc.settings import tuning
from aipo_hpc.sources import parse_all
from aipo_hpc.stages.clusters import ClustersConfig
from aipo_hpc.stages.conversations import ConversationsConfig
from aipo_hpc.stages.evaluate import EvaluateConfig, judging
from aipo_hpc.stages.generate import GenerateConfig, num_candidates
from aipo_hpc.stages.instruct import InstructConfig
from aipo_hpc.stages.pairs import PairsConfig
from aipo_hpc.stages.preferences import PreferencesConfig
from aipo_hpc.stages.prompts import PromptsConfig
from aipo_hpc.stages.rank import RankConfig
from aipo_hpc.stages.reference import ReferenceConfig
from aipo_hpc.stages.sft import SftConfig
from aipo_hpc.stages.train import TrainConfig


@dataclass(frozen=True)
class SlurmConfig:
    """How this site wants its jobs. Passed on to sbatch through submitit; never part of a run's content."""

    account: str | None = tuning(None)
    """Account to charge."""
    partition: str | None = tuning(None)
    """Partition of all jobs that name none of their own in their resources."""
    qos: str | None = tuning(None)
    """Quality of service."""
    constraint: str | None = tuning(None)
    """Node features."""
    exclude: str | None = tuning(None)
    """Nodes to keep off."""
    setup: tyro.conf.UseAppendAction[tuple[str, ...]] = tuning(())
    """Shell lines run on the node before the job, e.g. 'module load cuda'."""
    srun_args: tyro.conf.UseAppendAction[tuple[str, ...]] = tuning(())
    """More arguments of srun, e.g. '--container-image=...'."""
    python: str | None = tuning(None)
    """Command that starts Python on the node, e.g. inside a container (None: this interpreter)."""
    sbatch_args: dict[str, str] = field(default_factory=dict, metadata={"tuning": True})
    """More options of sbatch by their long names, e.g. reservation maintenance."""
    driver: Resources = tuning(Resources(time=30))
    """The job of a step of drive=chain."""
    step_seconds: float = tuning(30.0)
    """Least time between two steps of drive=chain, in seconds."""
    query_seconds: float = tuning(20.0)
    """Least time between two queries of the scheduler, in seconds. Finished shards are seen earlier, by their files."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a run. ``prompts`` and the models are names of the hub or local paths."""

    name: str = "unnamed"
    """Name of the recipe; a run directory belongs to one."""
    model_name_or_path: str = ""
    """The initial policy: an instruction-tuned model."""
    revision: str | None = None
    """Revision of the initial policy on the hub."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the policy's model. Off: such a model is refused."""
    chat_template: str | None = None
    """How conversations are put to the policy, everywhere: mistral-instruct, llama, vicuna, zephyr, or the path of a Jinja
    file (None: as its tokenizer says)."""
    prompts: str = ""
    """Where the prompts come from: Hugging Face dataset ids or local files, as in 'some/data[split]:0.5 + my.jsonl'."""
    iterations: int = 3
    """Iterations of generate, rank, pairs, reference, train, evaluate. May be raised later to go on with a run."""
    seed: int = 42
    """Seed of everything that is drawn."""
    data: PromptsConfig = PromptsConfig()
    conversations: ConversationsConfig = ConversationsConfig()
    sft: SftConfig = SftConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    instruct: InstructConfig = InstructConfig()
    seed_prompts: str = ""
    """Where the seeds of self-instruct come from, as ``prompts`` (empty: the run's prompts, without those held out)."""
    seed_data: PromptsConfig = PromptsConfig(num_held_out=0)
    clusters: ClustersConfig = ClustersConfig()
    generate: GenerateConfig = GenerateConfig()
    rank: RankConfig = RankConfig()
    pairs: PairsConfig = PairsConfig()
    guard: GuardConfig = tuning(GuardConfig())
    reference: ReferenceConfig = ReferenceConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: Literal["local", "slurm", "inline"] = tuning("slurm")
    """Where jobs run: slurm, local (this machine, all its GPUs), inline (in this process)."""
    slurm: SlurmConfig = tuning(SlurmConfig())
    run_dir: str | None = tuning(None)
    """Folder of the run, on a file system that all nodes share (None: runs/<name>)."""
    drive: Literal["follow", "chain", "once", "prepare"] = tuning("follow")
    """follow: until the run ends; chain: by small Slurm jobs, each of which submits the next, so that no process stays; once:
    one look, for cron; prepare: write the run directory, submit nothing."""
    keep_models: int | None = tuning(None)
    """How many of the last trained models to keep, beside the best by win rate (None: all). Older ones are deleted when
    nothing reads them any more; rows and pairs stay."""
    poll_seconds: float = tuning(2.0)
    """Time between two looks at the run's files, in seconds."""
    payload_timeout: float = tuning(120.0)
    """How long a worker waits for the files of a finished input to become visible on its node, in seconds."""

    def folder(self) -> Path:
        """The run's directory."""
        return Path(self.run_dir) if self.run_dir else Path("runs") / self.name


def validate(recipe: Recipe) -> None:
    """Raise RecipeError for the first value that does not make sense."""
    if recipe.chat_template is not None:
        read_template(recipe.chat_template)
    check_ranker(recipe.rank)
    check_models(recipe.rank)
    if recipe.evaluate.ranker:
        check_ranker(recipe.evaluate, "evaluate")
    check_models(judging(recipe.evaluate, recipe.rank), "evaluate")
    check_engine(recipe.generate)
    benchmarks.check_benchmarks(recipe.evaluate.benchmarks)
    check_engine(recipe.instruct)
    wrong = [
        (
            not re.fullmatch(r"[A-Za-z0-9][\w.-]*", recipe.name),
            f"name={recipe.name!r}: names the run directory, so use letters, digits, '.', '_' and '-' only.",
        ),
        (
            bool(
                secret := _secret_in([*recipe.slurm.setup, *recipe.slurm.srun_args, *recipe.slurm.sbatch_args.values()])
            ),
            f"slurm.* sets {secret}, and would be kept in files of the run. Leave it out: jobs get the launch's environment.",
        ),
        (not recipe.model_name_or_path, "model_name_or_path is not set: give the initial policy, a path or hub name."),
        (not recipe.prompts, "prompts is not set: give a dataset id or the path of a .jsonl or .parquet file."),
        (
            recipe.drive == "chain" and recipe.cluster != "slurm",
            f"drive=chain needs cluster=slurm, not {recipe.cluster}: its steps are Slurm jobs. Use drive=follow.",
        ),
        (recipe.iterations < 1, f"iterations={recipe.iterations}: must be at least 1."),
        (
            num_candidates(recipe.generate) < 2,
            f"generate.n={recipe.generate.n}: pairs.selection=best_worst needs at least 2 candidates per prompt.",
        ),
        (
            not recipe.generate.temperature >= 0,
            f"generate.temperature={recipe.generate.temperature}: must be 0 or more.",
        ),
        (
            recipe.generate.temperature == 0,
            "generate.temperature=0 samples the same candidate n times, so no pair could be made: set it above 0.",
        ),
        (
            recipe.generate.second_temperature is not None and not recipe.generate.second_temperature > 0,
            f"generate.second_temperature={recipe.generate.second_temperature}: must be above 0, or unset; "
            "generate.greedy adds the candidate of temperature 0.",
        ),
        (not 0 < recipe.generate.top_p <= 1, f"generate.top_p={recipe.generate.top_p}: must be in (0, 1]."),
        (recipe.generate.top_k < 0, f"generate.top_k={recipe.generate.top_k}: must be 0 (all tokens) or more."),
        (
            not all(dataset.source for dataset in recipe.pairs.mix),
            "pairs.mix has a dataset without a source: give a dataset id or the path of a file.",
        ),
        (
            any(source.part < 1 for source in parse_all(recipe.pairs.decontaminate or "none")),
            f"pairs.decontaminate={recipe.pairs.decontaminate!r}: a part of a list of benchmark prompts is of no use.",
        ),
        (
            not recipe.pairs.guard == recipe.train.guard == GuardConfig(),
            "thresholds of the guard are set by the recipe's guard.*, for all stages at once.",
        ),
        (recipe.data.num_held_out < 1, f"data.num_held_out={recipe.data.num_held_out}: must be at least 1."),
        (
            recipe.rank.num_shards not in (None, recipe.generate.num_shards),
            f"rank.num_shards={recipe.rank.num_shards}: must equal generate.num_shards={recipe.generate.num_shards}, "
            "since shard i of rank reads shard i of generate. Leave it unset.",
        ),
    ]
    positive = {
        "keep_models": recipe.keep_models,
        "generate.num_shards": recipe.generate.num_shards,
        "generate.n": recipe.generate.n,
        "generate.num_prompts": recipe.generate.num_prompts,
        "generate.max_tokens": recipe.generate.max_tokens,
        "generate.max_prompt_tokens": recipe.generate.max_prompt_tokens,
        "data.limit": recipe.data.limit,
        "generate.batch_size": recipe.generate.batch_size,
        "evaluate.num_shards": recipe.evaluate.num_shards,
    }
    for stage in ("generate", "rank", "evaluate"):
        dtype = getattr(recipe, stage).dtype
        wrong.append((dtype not in DTYPES, f"{stage}.dtype={dtype!r}: must be one of {', '.join(DTYPES)}."))
    if recipe.instruct.num_prompts:
        wrong.append(
            (
                bool(recipe.preferences.source),
                f"preferences.source={recipe.preferences.source!r}: nothing is sampled then, so new prompts are of no use. "
                "Set instruct.num_prompts=0, or leave preferences.source empty.",
            )
        )
        wrong += unfit_settings(recipe.instruct, recipe.clusters, recipe.generate)
        positive |= {f"instruct.{name}": getattr(recipe.instruct, name) for name in COUNTS}
        if recipe.slurm.python is None:  # what is installed here is what tasks have
            refuse_missing_libraries(recipe.instruct, recipe.clusters)
    for stage in ("instruct", "clusters", "generate", "rank", "pairs", "reference", "train", "evaluate"):
        resources = getattr(recipe, stage).resources
        for name in ("nodes", "tasks_per_node", "cpus_per_task", "time", "array_parallelism"):
            positive[f"{stage}.resources.{name}"] = getattr(resources, name)
        gpus = resources.gpus_per_node
        wrong.append((gpus < 0, f"{stage}.resources.gpus_per_node={gpus}: must be 0 (none) or more."))
    wrong += [
        (value is not None and value < 1, f"{name}={value}: must be at least 1.") for name, value in positive.items()
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise RecipeError(f"recipe {recipe.name!r}: {message}")
    for config in (recipe.train, *([recipe.sft] if recipe.conversations.source else [])):
        if recipe.slurm.python is None:  # what is installed here is what tasks have
            refuse_missing_packages(config)
        gradient_accumulation_steps(config, config.resources.nodes * config.resources.tasks_per_node)


def _secret_in(lines: Sequence[str]) -> str:
    """The first name of a token or password that one of these lines sets."""
    found = re.search(r"\b(\w*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|CREDENTIALS?))=", "\n".join(lines), re.IGNORECASE)
    return found.group(1) if found else ""


def recipes_folder() -> Path:
    """Where the recipes that come with the package are: inside it when installed, beside it in a checkout."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


def known_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in recipes_folder().glob("*.py") if not path.stem.startswith("_"))


def load_recipe(name_or_path: str) -> Recipe:
    """Return the recipe of that name, or the one in the Python file of that path.

    Raises RecipeError when there is none, or when the file does not define ``recipe() -> Recipe``.
    """
    path = Path(name_or_path)
    if path.suffix != ".py":
        names = known_recipes()
        if name_or_path not in names:
            close = get_close_matches(name_or_path, names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RecipeError(
                f"recipe {name_or_path!r} is not known; there are {', '.join(names)}.{hint} "
                "A recipe of your own is given by its path: recipe=path/to/mine.py"
            )
        path = recipes_folder() / f"{name_or_path}.py"
    if not path.is_file():
        raise RecipeError(f"recipe {name_or_path!r}: no such file as {path.resolve()}.")
    try:
        made = getattr(_module(path), "recipe", None)
        if not callable(made):
            raise RecipeError(f"{path}: does not define a function recipe() that returns an aipo_hpc.recipe.Recipe.")
        recipe = made()
    except (SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError, OSError) as error:
        raise RecipeError(f"{path}: cannot be run, {type(error).__name__}: {error}. Mend the file.") from error
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{path}: recipe() returned {type(recipe).__name__}, not an aipo_hpc.recipe.Recipe.")
    return recipe


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"aipo_hpc_recipe_{path.stem.replace('-', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
