"""What outside things are, by their content and not by their place."""

import shutil
from pathlib import Path

import pytest

from aipo_hpc.identity import identify, looks_local


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "part" / "weights").write_bytes(bytes(range(256)) * 8)
    return folder


def test_a_folder_that_moves_stays_the_same_thing(model: Path, tmp_path: Path) -> None:
    before = identify(str(model))
    assert before.startswith("sha256:")
    shutil.copytree(model, tmp_path / "elsewhere" / "other name")
    assert identify(str(tmp_path / "elsewhere" / "other name")) == before


def test_a_changed_byte_a_changed_name_and_another_file_each_make_another_thing(model: Path) -> None:
    seen = {identify(str(model))}
    weights = model / "part" / "weights"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    seen.add(identify(str(model)))
    weights.rename(model / "part" / "weights2")
    seen.add(identify(str(model)))
    (model / "empty").touch()
    seen.add(identify(str(model)))
    assert len(seen) == 4


def test_hidden_files_do_not_count(model: Path) -> None:
    before = identify(str(model))
    (model / ".gitattributes").write_text("x")
    assert identify(str(model)) == before


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    one.write_text("x\n")
    two.write_text("x\n")
    three.write_text("y\n")
    assert identify(str(one)) == identify(str(two)) != identify(str(three))


def test_a_hub_name_is_itself_with_its_revision() -> None:
    assert identify("somebody/model") == "somebody/model"
    assert identify("somebody/model", "v2") == "somebody/model@v2"


def test_big_files_are_sampled_at_both_ends_and_between_and_by_size(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    size = 40 << 20
    with path.open("wb") as file:
        file.truncate(size)
    seen = {identify(str(path))}
    for position in (0, size // 2 - size // 30, size - 1):
        with path.open("r+b") as file:
            # A changed optimizer step changes a stretch of the weights, not a single byte.
            file.seek(max(0, position - (3 << 20)))
            file.write(b"x" * min(6 << 20, size - max(0, position - (3 << 20))))
        seen.add(identify(str(path)))
    with path.open("r+b") as file:
        file.truncate(size + 1)
    seen.add(identify(str(path)))
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("name", "local"),
    [("somebody/model", False), ("model", False), ("./model", True), ("/a/b", True), ("~/m", True), ("a/b/c", True)],
)
def test_names_that_can_only_be_paths_are_taken_for_paths(name: str, local: bool) -> None:
    assert looks_local(name) is local


def test_a_name_that_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebody" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert looks_local("somebody/model")
