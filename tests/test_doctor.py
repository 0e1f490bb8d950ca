"""Whether a machine has what a run needs: each row ok, a warning or a problem, with what to do."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import small_disk
from sandbox import Sandbox

from aipo_hpc import doctor
from aipo_hpc.__main__ import main
from aipo_hpc.clusters.slurm import SlurmCluster
from aipo_hpc.doctor import Finding, examine, findings_table, folder, slurm
from aipo_hpc.errors import ClusterError
from aipo_hpc.launch import launch
from aipo_hpc.recipe import Recipe, SlurmConfig, load_recipe
from aipo_hpc.store import Run


def by_name(findings: Iterator[Finding] | list[Finding]) -> dict[str, Finding]:
    return {finding.what.split(" /")[0]: finding for finding in findings}


def test_a_machine_that_has_everything_is_told_row_by_row(small_recipe: Recipe) -> None:
    found = by_name(examine(small_recipe, Run(small_recipe.folder()).path))
    for finding in found.values():
        print(finding)
    assert {each.state for each in found.values()} <= {"ok", "warning"}
    assert {"recipe", "run_dir", "torch", "transformers", "models and prompts", "GPU of this machine"} <= found.keys()
    assert not Run(small_recipe.folder()).path.exists(), "looking makes nothing"


def test_the_exit_code_is_0_without_a_problem_and_1_with_one(
    small_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["doctor", "recipe=demo", f"run_dir={tmp_path / 'run'}"]
    assert main(asked) == 0
    assert main([*asked, f"model_name_or_path={tmp_path / 'nowhere'}"]) == 1
    assert f"no such folder as {tmp_path / 'nowhere'}" in " ".join(capsys.readouterr().out.split())
    assert main([*asked, "generate.n=1"]) == 1
    assert "needs at least 2 candidates" in " ".join(capsys.readouterr().out.split())


def test_a_run_directory_is_examined_with_the_recipe_that_is_in_it(
    small_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch(replace(small_recipe, drive="prepare"))
    before = sorted(run.path.rglob("*"))
    assert main(["doctor", str(run.path)]) == 0
    assert "demo" in capsys.readouterr().out
    assert sorted(run.path.rglob("*")) == before


def test_a_machine_without_slurm_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = slurm(SlurmConfig(), [])
    assert finding.state == "problem" and "sbatch" in finding.found and "cluster=local" in finding.advice


def test_a_folder_that_others_may_write_to_is_a_problem(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    finding = folder(tmp_path)
    assert finding.state == "problem" and f"chmod go-w {tmp_path}" in finding.found


def test_a_place_that_is_no_folder_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert folder(tmp_path / "file" / "run").state == "problem"


def test_a_file_system_that_cannot_do_something_is_a_problem_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(doctor._TRIALS, "exclusive link", lambda trial: False)
    finding = folder(tmp_path)
    assert finding.state == "problem" and finding.found == "does not work there: exclusive link"
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_links_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    finding = folder(tmp_path)
    assert finding.state == "problem" and "Operation not permitted" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_little_space_is_a_warning(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "900k") as small:
        small.chmod(0o700)
        finding = folder(small / "run")
    assert finding.state == "warning" and "keep_models=1" in finding.advice


def test_a_package_that_is_missing_is_a_problem_only_where_it_is_used(
    small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_LIBRARIES", ("vllm", "no-such-package"))
    with_vllm = replace(small_recipe, generate=replace(small_recipe.generate, engine="vllm"))
    real = doctor.importlib.metadata.version

    def version(name: str) -> str:
        if name == "vllm":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    states = {each.what: each.state for each in doctor._libraries(small_recipe)}
    assert states == {"vllm": "ok", "no-such-package": "problem"}
    assert next(iter(doctor._libraries(with_vllm))).state == "problem"
    elsewhere = replace(with_vllm, slurm=SlurmConfig(python="singularity exec image python"))
    assert next(iter(doctor._libraries(elsewhere))).state == "warning"


def test_a_real_slurm_is_looked_at_and_nothing_is_submitted(
    slurm_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm_sandbox.env.items():
        monkeypatch.setenv(name, value)
    partition = slurm_sandbox.run("sinfo", "--noheader", "--format=%R").split()[0]
    found = by_name(slurm(SlurmConfig(), [partition, "mistyped"]))
    for finding in found.values():
        print(finding)
    assert found["controller"].found.startswith("answers, Slurm 2")
    assert found["MaxArraySize"].state == found["accounting"].state == found[f"partition {partition}"].state == "ok"
    assert found["partition mistyped"].state == "problem" and partition in found["partition mistyped"].found
    assert "MaxSubmitJobs" in found


def test_a_controller_that_does_not_answer_is_a_problem(
    slurm_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort=1\nMessageTimeout=2\nAuthType=auth/none\n"
    )
    found = by_name(slurm(SlurmConfig(), ["gpu"]))
    assert found["controller"].state == "problem" and "SLURM_CONF" in found["controller"].advice
    assert "MaxArraySize" not in found, "what is not known is not told"
    with pytest.raises(ClusterError, match=r"(?s)controller does not answer .*slurm.conf.*type the same command again"):
        SlurmCluster(SlurmConfig())


def test_the_table_says_what_to_do() -> None:
    table = findings_table([Finding("a", "problem", "b", "c")])
    assert [next(iter(column.cells)) for column in table.columns] == ["a", "problem", "b", "c"]


def test_the_recipe_for_slurm_names_its_partitions() -> None:
    recipe = load_recipe("ultrafeedback")
    named = replace(recipe, slurm=SlurmConfig(partition="gpu"))
    assert doctor._partitions(named) == ["gpu"]
    assert doctor._partitions(recipe) == []
