import os
import shutil

import pytest

from moe_dist.data.atomic import new_folder
from moe_dist.data.made import MADE_FILE, begin, made


@pytest.fixture
def note(tmp_path, monkeypatch):
    monkeypatch.setenv(MADE_FILE, str(tmp_path / "note"))
    begin(tmp_path / "note", "stage")
    return tmp_path / "note"


def make(folder, text="x"):
    with new_folder(folder, marker="whole") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text(text)
        (temporary / "whole").touch()


def test_what_a_stage_has_made(note, tmp_path):
    assert made(note, "stage") == []
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert made(note, "stage") == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert made(note, "another") == []
    begin(note, "another")
    assert made(note, "another") == made(note, "stage") == []


def test_only_what_is_still_as_it_was(note, tmp_path):
    for name in "abcd":
        make(tmp_path / name)
    (tmp_path / "a" / "deep" / "file").write_text("longer")
    (tmp_path / "b" / "more").touch()
    shutil.rmtree(tmp_path / "c")
    assert made(note, "stage") == [str(tmp_path / "d")]
    state = (tmp_path / "d" / "deep" / "file").stat()
    os.utime(tmp_path / "d" / "deep" / "file", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert made(note, "stage") == []


def test_a_death_before_the_folder_has_its_name(note, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a")
    assert made(note, "stage") == []


def test_nothing_without_a_recipe_and_damage_is_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv(MADE_FILE, raising=False)
    make(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert made(tmp_path / "note", "stage") == []
    (tmp_path / "note").write_text("[tor")
    assert made(tmp_path / "note", "stage") == []
