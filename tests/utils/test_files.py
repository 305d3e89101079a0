"""utils/files.py: what a failure while writing leaves behind, and says."""

from pathlib import Path

import pytest

from utils.files import atomic_path


def write_where_a_folder_stands(path: Path) -> None:
    """Writing is refused, to root as well."""
    with atomic_path(path) as partial:
        partial.mkdir()
        try:
            partial.write_text("{}")
        finally:
            partial.rmdir()


def read_within(path: Path, other: Path) -> None:
    with atomic_path(path):
        other.read_text()


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "cost.json"
    with pytest.raises(IsADirectoryError) as error:
        write_where_a_folder_stands(path)
    assert error.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        read_within(tmp_path / "a", tmp_path / "none")
    assert str(error.value.filename) == str(tmp_path / "none")
