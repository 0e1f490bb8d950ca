"""docs/extending.md works as it stands: its files and lines in a copy of the package, its command run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from aipo_hpc.recipe import load_recipe, validate
from aipo_hpc.store import Run

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "cluster=inline",
    "iterations=1",
    "data.limit=20",
    "data.num_held_out=6",
    "generate.n=3",
    "generate.num_shards=1",
    "generate.max_tokens=10",
    "train.num_train_epochs=1",
    "train.global_batch_size=8",
    "train.per_device_train_batch_size=8",
]
WHERE = {
    "at the imports": lambda text, block: re.sub(r"\n(?=from aipo_hpc)", "\n" + block, text, count=1),
    "at the end of an iteration": lambda text, block: text.replace(
        "\n    return make_graph(jobs)\n", f"\n{block}    return make_graph(jobs)\n"
    ),
}


def blocks(language: str) -> list[str]:
    """Code blocks of the page."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def put(folder: Path, block: str) -> str:
    """Do what a block's first line says; returns the file that it is about."""
    comment, rest = block.split("\n", 1)
    name, _, where = comment.removeprefix("# ").partition(", ")
    path = folder / name
    if not where:
        assert not path.exists(), f"{name} is there already"
        path.write_text(rest)
        return name
    text = path.read_text()
    if where in WHERE:
        changed = WHERE[where](text, rest)
    else:
        table = where.removeprefix("in ")
        changed = re.sub(rf"(?m)^({table}\b.*= {{\n)", lambda found: found[1] + rest, text)
    assert changed != text, f"{comment}: no such place"
    path.write_text(changed)
    return name


def test_a_recipe_a_ranker_an_objective_and_a_stage_are_a_file_and_a_line_each_and_work(tmp_path: Path) -> None:
    for name in ("aipo_hpc", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    names = [put(tmp_path, block) for block in blocks("python")]
    new = [name for name in names if not (ROOT / name).exists()]
    assert [Path(name).parent.name for name in new] == ["recipes", "rankers", "objectives", "stages"]
    (typed,) = blocks("bash")
    command = shlex.split(typed.replace("\\\n", " "))
    assert command[0] == "python"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command[1:], *SMALL],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    mine = load_recipe(str(tmp_path / "recipes" / "mine.py"))
    validate(mine)
    assert mine.instruct.num_prompts == 20_000 and [each.name for each in mine.evaluate.benchmarks] == [
        "mt_bench",
        "alpaca_eval",
    ]
    run = Run(tmp_path / "runs" / "extended")
    train, lengths = (run.job(f"iter-00/{name}").read_job() for name in ("train", "lengths"))
    assert train is not None and lengths is not None
    assert (train["settings"]["loss_type"], train["settings"]["lambda_"]) == ("dpo_positive", 5)
    (sentinel,) = run.job("iter-00/lengths").done(lengths["fingerprint"]).values()
    folder = run.job("iter-00/lengths").attempt_folder(0, sentinel.attempt)
    print(f"answers by length, quartiles: {json.loads((folder / 'lengths.json').read_text())}; {sentinel.counts}")
