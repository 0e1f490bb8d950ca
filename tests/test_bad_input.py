"""Bad input gets an error that says what, where and what to do, before anything is submitted; mended, the same command runs."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes import fill, small_disk

from aipo_hpc.launch import main
from aipo_hpc.store import Run

DEMO = Path(__file__).parents[1] / "recipes" / "demo_assets"
SMALL = (
    "recipe=demo", "cluster=inline", "iterations=1", "data.limit=8", "data.num_held_out=2", "generate.n=2",
    "generate.max_tokens=4", "poll_seconds=0.05", "payload_timeout=1",
)  # fmt: skip

Refused = Callable[..., str]


@dataclass
class Launched:
    """What became of a launch."""

    code: int
    said: str


@pytest.fixture
def launched(capsys: pytest.CaptureFixture[str]) -> Callable[..., Launched]:
    """A small launch with more arguments."""

    def start(*arguments: str) -> Launched:
        capsys.readouterr()
        try:
            code = main([*SMALL, *arguments])
        except SystemExit as ended:  # tyro's way
            code = int(str(ended.code))
        said = capsys.readouterr()
        return Launched(code, said.out + said.err)

    return start


@pytest.fixture
def refused(launched: Callable[..., Launched], tmp_path: Path) -> Refused:
    """What is said to a launch that the user has to mend (exit code 2) and that submitted nothing."""

    def start(*arguments: str, run: Path = tmp_path / "run", code: int = 2) -> str:
        ended = launched(f"run_dir={run}", *arguments)
        assert ended.code == code, ended.said
        assert "Traceback" not in ended.said
        assert not run.is_dir() or not [event for event in Run(run).read_journal() if event["event"] == "submit"]
        print(ended.said)
        return ended.said

    return start


def says(text: str, *parts: str) -> None:
    """All parts are in the text, whose lines a frame may break."""
    words = " ".join(text.replace("│", " ").split())
    for part in parts:
        assert part in words, f"{part!r} is not in {words}"


def prompts_file(path: Path, *lines: object) -> Path:
    """A file of prompts; texts are lines as they stand."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def good(number: int) -> dict[str, object]:
    """A row that is all right."""
    return {"prompt": f"Say {number}.", "prompt_id": f"id-{number}"}


# -- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("recipe=demmo", ("'demmo' is not known", "Did you mean 'demo'?", "recipe=path/to/mine.py")),
        ("generate.temperatur=1", ("--generate.temperatur", "--generate.temperature FLOAT")),
        ("train.loss_type=apio", ("loss_type='apio' is not an objective", "Did you mean 'aipo'?")),
        ("generate.engine=transformer", ("generate.engine='transformer'", "Did you mean 'transformers'?")),
        ("rank.ranker=pair_rm", ("'pair_rm'", "did you mean 'pairrm'?", "known: pairrm")),
        ("evaluate.ranker=pair_rm", ("'pair_rm'", "did you mean 'pairrm'?")),
        ("pairs.accumulate=1.5", ("pairs.accumulate=(1.5,)", "at most 1")),
        ("guard.stop_tie_rate=0.1", ("guard.stop_tie_rate=0.1 comes before guard.warn_tie_rate=0.5",)),
        ("pairs.guard.stop_tie_rate=0.9", ("--pairs.guard.stop_tie_rate", "--guard.stop_tie_rate {None}|FLOAT")),
        ("train.beta=0", ("train.beta=0.0 must be above 0",)),
        ("train.beta=-1", ("train.beta=-1.0 must be above 0",)),
        ("generate.n=1", ("generate.n=1", "best_worst needs at least 2 candidates")),
        ("cluster=slrum", ("'slrum'", "--cluster", "'slurm'")),
    ],
)
def test_a_wrong_setting_is_refused_before_there_is_a_run_directory(
    argument: str, parts: tuple[str, ...], refused: Refused, tmp_path: Path
) -> None:
    says(refused(argument), *parts)
    assert not (tmp_path / "run").exists()


# -- prompts ------------------------------------------------------------------------------------------------------------

BAD_PROMPTS: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
    ((), ("prompts.jsonl: no prompts in it", "at least one row")),
    (("", "\n"), ("prompts.jsonl: no prompts in it",)),
    (({"text": "Hello."},), ("prompts.jsonl, line 1", "no column 'prompt'; there are ['text']", "data.prompt_column")),
    ((good(1), good(2), good(1)), ("prompts.jsonl", "row 3 repeats prompt_id 'id-1'", "Ids must be unique")),
    ((good(1), '{"prompt": "cut off'), ("prompts.jsonl, line 2: not JSON", "column 12", "one JSON object")),
    ((good(1), good(2), "[1, 2]"), ("prompts.jsonl, line 3", "a JSON list, not an object")),
    ((good(1), {"prompt": 3}), ("prompts.jsonl, line 2", "holds int, not text")),
    ((good(1), {"prompt": " "}), ("prompts.jsonl, line 2", "is empty", "Remove the row")),
    ((good(1), good(2)), ("2 prompts", "data.num_held_out=2", "none is left to train on", "give more prompts")),
]


@pytest.mark.parametrize(("lines", "parts"), BAD_PROMPTS, ids=[parts[-1] for _, parts in BAD_PROMPTS])
def test_bad_prompts_are_refused_and_the_same_command_runs_once_they_are_mended(
    lines: tuple[object, ...],
    parts: tuple[str, ...],
    refused: Refused,
    launched: Callable[..., Launched],
    tmp_path: Path,
) -> None:
    path = prompts_file(tmp_path / "prompts.jsonl", *lines)
    says(refused(f"prompts={path}"), "DataError", *parts)
    prompts_file(path, *map(good, range(5)))
    mended = launched(f"run_dir={tmp_path / 'run'}", f"prompts={path}", "drive=prepare")
    assert mended.code == 0, mended.said


def test_a_missing_prompt_file_is_refused_with_its_path(refused: Refused, tmp_path: Path) -> None:
    says(refused(f"prompts={tmp_path / 'absent.jsonl'}"), str(tmp_path / "absent.jsonl"), "no such file")


def test_a_dataset_without_the_column_is_refused_with_the_columns_there_are(refused: Refused, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["What?"], "answer": ["That."]}), tmp_path / "prompts.parquet")
    said = refused(f"prompts={tmp_path / 'prompts.parquet'}")
    says(said, "prompts.parquet, row 1", "no column 'prompt'; there are ['answer', 'question']", "data.prompt_column")


def test_a_dataset_that_cannot_be_had_is_refused_with_its_id(refused: Refused) -> None:
    says(refused("prompts=nobody/has-this-dataset"), "nobody/has-this-dataset", "'train'", "reachable", "local file")


# -- models -------------------------------------------------------------------------------------------------------------


def test_a_list_of_benchmark_prompts_that_is_not_there_is_refused(refused: Refused, tmp_path: Path) -> None:
    says(
        refused(f"pairs.decontaminate={tmp_path / 'absent.jsonl'}"),
        "DataError",
        f"{tmp_path / 'absent.jsonl'}: no such",
    )


def test_a_preference_dataset_is_refused_at_the_launch_and_the_same_command_goes_on_once_it_is_mended(
    refused: Refused, launched: Callable[..., Launched], tmp_path: Path
) -> None:
    pairs, mine = tmp_path / "pairs.jsonl", tmp_path / "mine.py"
    mine.write_text(
        "from dataclasses import replace\nfrom aipo_hpc.recipe import load_recipe\n"
        "from aipo_hpc.stages.pairs import MixConfig\n"
        "def recipe():\n    demo = load_recipe('demo')\n"
        f"    mixed = (MixConfig(source={str(pairs)!r}, name='mine', ratio=0.5),)\n"
        "    return replace(demo, pairs=replace(demo.pairs, mix=mixed))\n"
    )
    pairs.write_text('{"prompt": "why", "chosen": "because"}\n')
    says(refused(f"recipe={mine}"), f"{pairs}, line 1: no column 'completions'", "rejected")
    pairs.write_text('{"prompt": "why", "chosen": "because", "rejected": "no"}\n')
    ended = launched(f"recipe={mine}", f"run_dir={tmp_path / 'run'}", "drive=prepare")
    assert ended.code == 0 and "iter-00/mixed_0: reading" in ended.said


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A copy of the demo's policy, to be spoilt."""
    return Path(shutil.copytree(DEMO / "policy", tmp_path / "policy"))


@pytest.fixture
def ranker(tmp_path: Path) -> Path:
    """A copy of the demo's ranker, to be spoilt."""
    return Path(shutil.copytree(DEMO / "ranker", tmp_path / "ranker"))


@pytest.mark.parametrize("field", ["model_name_or_path", "rank.model_name_or_path", "evaluate.model_name_or_path"])
def test_a_missing_model_folder_is_refused_with_its_path(field: str, refused: Refused, tmp_path: Path) -> None:
    says(refused(f"{field}={tmp_path / 'absent'}"), "DataError", f"no such folder as {tmp_path / 'absent'}", "hub name")


@pytest.mark.parametrize("field", ["model_name_or_path", "rank.model_name_or_path"])
def test_a_model_that_cannot_be_fetched_is_refused_with_how_to_fetch_it(field: str, refused: Refused) -> None:
    says(refused(f"{field}=nobody/has-this-model"), "nobody/has-this-model", "hf download", "HF_HOME")


def test_a_folder_that_is_no_model_is_refused(refused: Refused, tmp_path: Path) -> None:
    says(refused(f"model_name_or_path={tmp_path}"), f"no config.json in {tmp_path}", "folder of a saved model")


def test_a_tokenizer_without_a_chat_template_is_refused(refused: Refused, policy: Path) -> None:
    (policy / "chat_template.jinja").unlink()
    says(refused(f"model_name_or_path={policy}"), str(policy), "no chat template", "add chat_template.jinja")


def test_a_model_without_a_tokenizer_is_refused(refused: Refused, policy: Path) -> None:
    (policy / "chat_template.jinja").unlink()
    (policy / "tokenizer_config.json").unlink()
    says(refused(f"model_name_or_path={policy}"), str(policy), "tokenizer_config.json", "beside the model")


@pytest.mark.parametrize("name", ["reward_model", "judge", "pairwise_judge"])
def test_a_ranker_that_is_put_to_conversations_without_a_chat_template_is_refused(
    name: str, refused: Refused, ranker: Path
) -> None:
    said = refused(f"rank.ranker={name}", f"rank.model_name_or_path={ranker}")
    says(said, "DataError", str(ranker), "no chat template", "add chat_template.jinja")


def test_a_damaged_configuration_is_refused(refused: Refused, policy: Path) -> None:
    (policy / "config.json").write_text('{"model_type": "lla')
    says(refused(f"model_name_or_path={policy}"), f"{policy}/config.json", "not JSON", "again")


def test_a_model_without_weights_is_refused(refused: Refused, policy: Path, ranker: Path) -> None:
    for field, folder in (("model_name_or_path", policy), ("rank.model_name_or_path", ranker)):
        (folder / "model.safetensors").unlink()
        says(refused(f"{field}={folder}"), str(folder), "no weights", "*.safetensors")


def test_truncated_weights_are_refused(refused: Refused, policy: Path, ranker: Path) -> None:
    for field, folder in (("model_name_or_path", policy), ("rank.model_name_or_path", ranker)):
        weights = folder / "model.safetensors"
        os.truncate(weights, weights.stat().st_size - 1000)
        says(refused(f"{field}={folder}"), f"{weights}: ", "bytes", "Copy or download it again")


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, (4).to_bytes(8, "little") + b"{}{}"])
def test_weights_that_are_no_safetensors_are_refused(content: bytes, refused: Refused, policy: Path) -> None:
    (policy / "model.safetensors").write_bytes(content)
    says(refused(f"model_name_or_path={policy}"), f"{policy}/model.safetensors: ", "Copy or download it again")


def test_a_missing_part_of_the_weights_is_refused(refused: Refused, policy: Path) -> None:
    (policy / "model.safetensors").rename(policy / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (policy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    says(refused(f"model_name_or_path={policy}"), str(policy), "model-00002-of-00002.safetensors", "download")


# -- run directories ----------------------------------------------------------------------------------------------------


def test_a_run_directory_of_another_recipe_is_refused(
    refused: Refused, launched: Callable[..., Launched], tmp_path: Path
) -> None:
    assert launched(f"run_dir={tmp_path / 'run'}", "drive=prepare").code == 0
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from dataclasses import replace\nfrom aipo_hpc.recipe import load_recipe\n"
        "def recipe():\n    return replace(load_recipe('demo'), name='mine')\n"
    )
    said = refused(f"recipe={mine}")
    says(said, f"RunError: {tmp_path / 'run'}", "a run of recipe 'demo', not of 'mine'", "run_dir=...")


def test_a_file_where_the_run_directory_should_be_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        says(refused(run=run), f"RunError: {run}: cannot be written", "run_dir=...")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_directory_on_a_read_only_file_system_is_refused(refused: Refused, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        says(refused(run=disk / "run"), f"{disk / 'run'}: cannot be written (Read-only file system)", "run_dir=...")


def test_a_run_directory_that_others_may_write_to_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    says(refused(), "others may write to it", f"chmod go-w {tmp_path / 'run'}")


def test_a_full_disk_is_named_and_the_same_command_goes_on_once_there_is_room(
    refused: Refused, launched: Callable[..., Launched], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        ballast = fill(disk)
        said = refused(run=disk / "run", code=1)
        says(said, f"DiskFull: {disk}", "No space left on device", "Free space", "type the same command again")

        os.truncate(ballast, ballast.stat().st_size - 24 * 1024)
        said = refused("drive=prepare", run=disk / "run", code=1)
        assert (disk / "run" / "recipe.json").is_file(), "there was no room for a beginning"
        says(said, f"DiskFull: {disk}", "No space left on device", "type the same command again")

        subprocess.run(["mount", "-o", "remount,size=16m,nr_inodes=2000", str(disk)], check=True)
        mended = launched(f"run_dir={disk / 'run'}", "drive=prepare")
        assert mended.code == 0, mended.said


def test_a_damaged_recipe_of_a_run_is_named_and_written_anew_once_it_is_moved_away(
    refused: Refused, launched: Callable[..., Launched], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert launched(f"run_dir={run}", "drive=prepare").code == 0
    os.truncate(run / "recipe.json", 30)
    says(refused(), f"RunError: {run}/recipe.json: damaged", "Move it away")
    (run / "recipe.json").rename(tmp_path / "damaged.json")
    mended = launched(f"run_dir={run}", "drive=prepare")
    assert mended.code == 0 and "reading" not in mended.said, "what was done is done no more"


@pytest.mark.parametrize("damage", ["truncated", "altered", "emptied"])
def test_a_damaged_sentinel_is_reported_and_its_shard_is_computed_again(
    damage: str, launched: Callable[..., Launched], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert launched(f"run_dir={run}", "drive=prepare").code == 0
    sentinel = run / "iter-00/prompts/done/00000.json"
    text = sentinel.read_text()
    sentinel.write_text(
        {"truncated": text[:-40], "altered": text.replace('"rows": 8', '"rows": 9'), "emptied": ""}[damage]
    )

    again = launched(f"run_dir={run}", "drive=prepare")
    assert again.code == 0
    says(again.said, f"{sentinel}: not believed", "counts as not done", "iter-00/prompts: reading")
    assert json.loads(sentinel.read_text())["rows"] == 8


def test_a_run_that_the_guard_stopped_goes_on_once_the_threshold_is_raised(
    launched: Callable[..., Launched], tmp_path: Path
) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    stopped = launched(run, "guard.warn_length_gap=None", "guard.stop_length_gap=-5")
    assert stopped.code == 1
    says(
        stopped.said,
        "iter-00/pairs shard 0: user_error: GuardStop",
        "is above guard.stop_length_gap=-5",
        "guard.stop_length_gap=...",
    )
    raised = launched(run, "guard.warn_length_gap=None", "guard.stop_length_gap=500")
    assert raised.code == 0, raised.said
    assert "generate: sent" not in raised.said, "what was done is not done again"
    says(raised.said, "Guard", "final model:")
