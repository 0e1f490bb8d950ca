"""A run described on the command line: field=value and --field value mean the same, and what is unknown gets a suggestion."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aipo_hpc.arguments import field_kinds, parse_recipe, split_recipe
from aipo_hpc.errors import RecipeError
from aipo_hpc.recipe import Recipe, load_recipe


def parse(*arguments: str) -> Recipe:
    """What the arguments say."""
    return parse_recipe(arguments, "program")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generate.n", "8"),
        ("generate.num_prompts", "100"),
        ("train.beta", "0.05"),
        ("train.alpha", "-0.5"),
        ("train.learning_rate", "1e-6"),
        ("train.lambda", "0.25"),
        ("train.gradient_checkpointing", "true"),
        ("train.resources.mem_gb", "1.5"),
        ("cluster", "slurm"),
        ("run_dir", "/a folder/with = signs"),
        ("generate.system_message", "--be brief"),
        ("generate.system_message", ""),
        ("slurm.setup", "module load cuda"),
        ("slurm.setup", "A=b"),
        ("slurm.srun_args", "--container-image=a/b:c"),
    ],
)
def test_all_ways_to_set_a_field_are_the_same(field: str, value: str) -> None:
    dashes = field.replace("_", "-")
    ways = [
        parse(f"{field}={value}"),
        parse(f"{dashes}={value}"),
        parse(f"--{field}={value}"),
        parse(f"--{field}", value),
        parse(f"--{dashes}", value),
        parse("recipe=demo", f"{field}={value}"),
        parse(f"{field}={value}", "--recipe", "demo"),
    ]
    assert ways[0] != load_recipe("demo")
    assert ways == [ways[0]] * len(ways)


def test_words_for_true_false_and_none_are_read_in_any_case_where_a_field_can_be_that() -> None:
    assert parse("train.gradient_checkpointing=TRUE").train.gradient_checkpointing is True
    assert parse("--train.gradient-checkpointing", "False").train.gradient_checkpointing is False
    assert parse("generate.num_prompts=None").generate.num_prompts is None
    assert parse("run_dir=null").run_dir is None
    assert parse("prompts=none", "slurm.setup=true").prompts == "none"
    assert parse("slurm.setup=true").slurm.setup == ("true",), "the shell's command"


def test_the_trailing_underscore_of_lambda_may_be_typed_or_left_out() -> None:
    assert parse("train.lambda_=0.3").train.lambda_ == parse("--train.lambda", "0.3").train.lambda_ == 0.3


def test_fields_of_several_values_are_given_once_per_value() -> None:
    expected = ("module load cuda", "export A=b", "source 'my env.sh'")
    assert parse(*(f"slurm.setup={line}" for line in expected)).slurm.setup == expected
    assert parse(*(part for line in expected for part in ("--slurm.setup", line))).slurm.setup == expected
    together = parse("--slurm.setup", *expected, "generate.n=9")
    assert (together.slurm.setup, together.generate.n) == (expected, 9)
    options = ("--container-image=x", "--container-mounts=/a:/b")
    assert parse(*(f"slurm.srun-args={option}" for option in options)).slurm.srun_args == options


@pytest.mark.parametrize(
    "arguments",
    [
        ["slurm.sbatch_args.reservation=maintenance", "slurm.sbatch_args.cpus-per-gpu=4"],
        ["--slurm.sbatch-args.reservation", "maintenance", "--slurm.sbatch_args.cpus-per-gpu=4"],
        ["--slurm.sbatch-args", "reservation", "maintenance", "--slurm.sbatch_args", "cpus-per-gpu", "4"],
        ["--slurm.sbatch-args", "reservation", "maintenance", "cpus-per-gpu", "4", "generate.n=3"],
    ],
)
def test_options_of_sbatch_are_given_by_their_own_names(arguments: list[str]) -> None:
    assert parse(*arguments).slurm.sbatch_args == {"reservation": "maintenance", "cpus-per-gpu": "4"}


def test_values_are_added_to_those_of_the_recipe(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from aipo_hpc.recipe import Recipe, SlurmConfig\n"
        "def recipe():\n"
        "    return Recipe(name='mine', slurm=SlurmConfig(setup=('module load cuda',), sbatch_args={'gres': 'gpu:1'}))\n"
    )
    made = parse(f"recipe={mine}", "slurm.setup=source env.sh", "slurm.sbatch_args.comment=mine")
    assert made.slurm.setup == ("module load cuda", "source env.sh")
    assert made.slurm.sbatch_args == {"gres": "gpu:1", "comment": "mine"}


@pytest.mark.parametrize("arguments", [["train.betta=1"], ["--train.betta", "1"], ["--train.betta=1"]])
def test_an_unknown_field_gets_a_suggestion_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "--train.betta" in said.out + said.err
    assert "--train.beta " in said.out + said.err


def test_a_value_of_the_wrong_type_is_refused_with_the_fields_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("generate.n=many")
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "generate.n" in said.out + said.err and "Candidates per prompt" in said.out + said.err


def test_a_misspelt_choice_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("cluster=slrum")
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "'slurm'" in said.out + said.err


@pytest.mark.parametrize("arguments", [["recipe="], ["--recipe"]])
def test_a_recipe_without_a_name_is_refused(arguments: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"recipe= names no recipe; there are demo, .*path"):
        parse(*arguments)


def test_without_a_recipe_it_is_the_demo() -> None:
    assert parse() == load_recipe("demo")
    assert split_recipe([]) == ("demo", [], [])


@pytest.fixture(scope="module")
def help_text() -> dict[str, str]:
    """What --help says of each field."""
    done = subprocess.run(
        [sys.executable, "-m", "aipo_hpc.launch", "recipe=ultrafeedback", "--help"],
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        text = line.strip("│ ")
        if text.startswith("--"):
            field = text.split()[0].removeprefix("--")
            found[field] = ""
        elif line.startswith("│       ") and found:
            found[field] += f"{text} "
    return found


def test_help_shows_every_field_with_what_it_is_and_its_default(help_text: dict[str, str]) -> None:
    assert set(help_text) == set(field_kinds(Recipe))
    for field, text in help_text.items():
        assert "(default: " in text or "(repeatable)" in text, field
        assert len(text.partition("(default: ")[0].split()) >= 2, f"{field} is not explained: {text}"
    print(f"{len(help_text)} fields, each with its help and default")


UNITS = {
    "second": ["poll_seconds", "payload_timeout", "slurm.query_seconds"],
    "minute": ["train.resources.time", "generate.resources.time"],
    "token": ["generate.max_tokens", "generate.max_prompt_tokens", "pairs.max_prompt_tokens", "rank.tokens_per_batch"],
    "GB": ["train.resources.mem_gb"],
}


@pytest.mark.parametrize(("unit", "field"), [(unit, field) for unit, fields in UNITS.items() for field in fields])
def test_help_tells_the_unit_of_times_and_lengths(unit: str, field: str, help_text: dict[str, str]) -> None:
    assert unit in help_text[field].lower().replace("gb", "GB")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_gets_completion_of_the_fields(shell: str, tmp_path: Path) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "aipo_hpc.launch", "--tyro-print-completion", shell],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "generate.n" in printed and "train.beta" in printed
    if shell == "bash":
        script = tmp_path / "completion.sh"
        script.write_text(printed)
        (function,) = re.findall(r"^complete -F (\w+) python -m aipo_hpc.launch$", printed, re.MULTILINE)
        typed = "COMP_WORDS=(python -m aipo_hpc.launch --generate.num_); COMP_CWORD=3"
        answer = subprocess.run(
            ["bash", "-c", f"source {script}; {typed}; {function}; echo ${{COMPREPLY[*]}}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert answer.stdout.split() == ["--generate.num_prompts", "--generate.num_shards"]
