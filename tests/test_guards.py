"""The rules of the house, as tests: what may import what, where a name may be spelled, how long a file may be."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "aipo_hpc"
FILES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {
    name.replace("/", ".").removesuffix(".__init__").removeprefix("aipo_hpc").removeprefix("."): path
    for name, path in FILES.items()
    if "demo_assets" not in name
}
"""Modules by their names inside the package; the package itself is the empty name."""

LAYERS = {
    "words": "errors leaving settings resources identity processes sentinel rows task allowance adjustment fine_tuning "
    "memory_kills clusters engines rankers rankers.config seeds selection filters decontamination mixing guard seed_pool "
    "deduplication instruct_filters harvest embeddings sources chat_formats objectives.* benchmarks benchmarks.*",
    "files": "own_code chat_templates durable ownership failures job_folder store journal lease progress suspects sampling "
    "claims blocks",
    "science": "length_control versions batches logps chat model_files checkpoints process_group gang trainer training "
    "trackers sft_trainer lora metrics_file running_ratios engines.guard rankers.*",
    "stages": "stages stages.*",
    "engines": "engines.*",
    "recipe": "instruct_settings recipe arguments",
    "graph": "outside stage_table graph record drift preflight parity",
    "execution": "decision living room leftovers reconcile damage worker here clusters.*",
    "driver": "sharing ledger model_card manifest retention explain driver chain cancel",
    "user": "plots summary lineage plan doctor terminal report launch __main__",
}
"""From the bottom to the top: a module imports from its own layer and those below it."""

HEAVY = {
    "torch",
    "transformers",
    "vllm",
    "deepspeed",
    "datasets",
    "pyarrow",
    "accelerate",
    "numpy",
    "llm_blender",
    "sklearn",
    "datasketch",
    "sentence_transformers",
    "matplotlib",
}

FILE_NAMES = {"manifest.json", "recipe.json", "journal.jsonl", "driver.lease", "set-aside", "job.json"}
FOLDER_NAMES = {"done", "failed", "shards", "logs"}


def layer_of(module: str) -> int:
    """The layer's number; fails for a module that none of them names."""
    for number, names in enumerate(LAYERS.values()):
        if module in names.split():
            return number
    for number, names in enumerate(LAYERS.values()):
        if any(name.endswith(".*") and (module + ".").startswith(name[:-1]) for name in names.split()):
            return number
    pytest.fail(f"aipo_hpc.{module} has no layer: name it in LAYERS")


def at_import(path: Path) -> Iterator[str]:
    """Modules that a file imports when it is itself imported: not inside functions, not for types alone."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            yield from imported(child)
            yield from visit(child)

    yield from visit(tree(path))


def imported(node: ast.AST) -> Iterator[str]:
    """What one statement imports; of ours, the module rather than the name in it."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            inside = f"{node.module}.{alias.name}"
            yield inside if inside.removeprefix("aipo_hpc.") in MODULES else node.module


def tree(path: Path) -> ast.Module:
    """A file, parsed."""
    return ast.parse(path.read_text(encoding="utf-8"))


def ours(path: Path) -> set[str]:
    """Modules of the package that a file imports at import."""
    return {name.removeprefix("aipo_hpc.") for name in at_import(path) if name.startswith("aipo_hpc.")}


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_down(module: str) -> None:
    up = {other for other in ours(MODULES[module]) if layer_of(other) > layer_of(module)}
    assert not up, f"aipo_hpc.{module} imports from a layer above its own: {up}"


def test_no_modules_import_each_other() -> None:
    order = list(TopologicalSorter({name: ours(path) - {name} for name, path in MODULES.items()}).static_order())
    assert {"errors", "launch"} <= set(order)


def test_only_science_and_engines_import_a_machine_learning_library_when_they_are_imported() -> None:
    may = [number for number, name in enumerate(LAYERS) if name in ("science", "engines")]
    for module, path in MODULES.items():
        if not module or layer_of(module) not in may:
            heavy = {name.partition(".")[0] for name in at_import(path)} & HEAVY
            assert not heavy, f"{path}: imports {heavy} at import; import it in the function that needs it"


def test_submitit_is_imported_under_clusters_only() -> None:
    for module, path in MODULES.items():
        everywhere = {name for node in ast.walk(tree(path)) for name in imported(node)}
        if any(name.partition(".")[0] == "submitit" for name in everywhere):
            assert module.startswith("clusters."), path


def test_no_other_module_than_the_store_spells_a_name_of_the_protocol() -> None:
    for module, path in MODULES.items():
        if module in ("store", "job_folder"):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant):
                assert node.value not in FILE_NAMES, f"{path}:{node.lineno}: {node.value!r}; take it from the store"
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
                assert node.right.value not in FOLDER_NAMES, f"{path}:{node.lineno}: ask the store for this folder"


BROAD = {
    "worker": 1,  # records whatever ended a shard, and raises it again
    "clusters.inline": 1,  # a driver outlives its tasks, also where these run inside it
    "rankers.pairrm_folder": 1,  # the tokenizers library raises bare Exception for an unreadable file
}


def test_broad_excepts_are_where_they_have_a_reason_and_nowhere_else() -> None:
    found: dict[str, int] = {}
    for module, path in MODULES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                if any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds):
                    found[module] = found.get(module, 0) + 1
    assert found == BROAD


def test_no_file_is_long() -> None:
    for path in MODULES.values():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 350, f"{path}: {lines} lines; a noun is missing"


def test_every_module_begins_with_what_it_is() -> None:
    for path in MODULES.values():
        assert ast.get_docstring(tree(path)), path


def test_the_file_tree_of_the_readme_names_every_module_and_nothing_else() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = readme.split("    aipo_hpc/\n")[1].split("\n    recipes/")[0]
    words = set(re.findall(r"[\w/]+\.py|\w+/", listed))
    names = {path.relative_to(PACKAGE) for path in MODULES.values()} - {Path("__init__.py")}
    for name in names:
        wanted = f"{name.parent}/" if name.name == "__init__.py" else name.name
        assert wanted in words or name.parent == Path("stages"), f"README.md does not name aipo_hpc/{name}"
    files = {name.name for name in names} | {f"{name.parent}/" for name in names}
    assert not {word for word in words if word not in files}, "README.md names files that are not there"
    for stage in (path.stem for path in (PACKAGE / "stages").glob("*.py") if path.stem != "__init__"):
        assert stage in listed.split("stages/")[1].splitlines()[0]


FORBIDDEN = ["/work" + "/", "/ro" + "ot/", "py" + "pi.org", "art" + "ifactory", "files.python" + "hosted", "ne" + "xus"]


def text_files() -> Iterator[Path]:
    """All text of the project."""
    for folder in ("aipo_hpc", "recipes", "sbatch", "tests", "tools", "docs", ".ci"):
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.is_file())
    yield from (ROOT / name for name in ("README.md", "pyproject.toml"))


def test_nothing_names_a_machine_or_a_package_index() -> None:
    for path in text_files():
        if path.suffix in (".safetensors", ".pyc") or path.name == "tokenizer.json":
            continue
        text = path.read_text(encoding="utf-8").lower()
        found = [word for word in FORBIDDEN if word in text]
        assert not found, f"{path}: {found}"


def test_every_command_of_the_measurements_names_a_file_that_is_there() -> None:
    commands = re.findall(r"`([^`]*)`", (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    named = [
        word for command in commands for word in command.split() if re.match(r"(tools|tests|sbatch|recipes)/", word)
    ]
    for word in named:
        assert (ROOT / word).exists(), word
    for command in commands:
        if found := re.match(r"python -m (aipo_hpc[\w.]*)", command):
            assert found[1].removeprefix("aipo_hpc").removeprefix(".") in MODULES
