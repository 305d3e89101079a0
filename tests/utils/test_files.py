"""utils/files.py: what a failure while writing leaves behind, and says."""

import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from utils.files import atomic_path, staging_folder


def write_where_a_folder_stands(path: Path) -> None:
    """Writing is refused, to root as well."""
    with atomic_path(path) as partial:
        partial.mkdir()
        try:
            partial.write_text("{}")
        finally:
            partial.rmdir()


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "cost.json"
    with pytest.raises(IsADirectoryError) as error:
        write_where_a_folder_stands(path)
    assert error.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error, atomic_path(tmp_path / "a"):
        (tmp_path / "none").read_text()
    assert str(error.value.filename) == str(tmp_path / "none")


def die_while_writing(path: Path) -> None:
    with atomic_path(path / "scores.json") as partial, staging_folder(path / "photos") as staging:
        partial.touch()
        (staging / "photo.jpg").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_run_removes_what_a_killed_one_left_hidden(tmp_path):
    child = get_context("fork").Process(target=die_while_writing, args=(tmp_path,))
    child.start()
    child.join()
    assert [path.name[0] for path in tmp_path.iterdir()] == [".", "."]
    with staging_folder(tmp_path / "photos") as staging:
        (staging / "photo.jpg").touch()
        staging.replace(tmp_path / "photos")
    with atomic_path(tmp_path / "scores.json") as partial:
        partial.touch()
    assert sorted(os.listdir(tmp_path)) == ["photos", "scores.json"]
