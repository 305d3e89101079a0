"""utils/files.py: what a failure while writing leaves behind, and says."""

import pytest

from utils.files import atomic_path


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "cost.json"
    with pytest.raises(OSError, match=r"cost\.json'$") as error, atomic_path(path) as partial:
        partial.mkdir()  # so that writing to it is refused, to root as well
        try:
            partial.write_text("{}")
        finally:
            partial.rmdir()
    assert error.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(OSError) as error, atomic_path(tmp_path / "a"):
        (tmp_path / "none").read_text()
    assert str(error.value.filename) == str(tmp_path / "none")
