"""Write files that are either whole or not there."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_NAME = 200  # bytes; file systems allow 255, with suffixes


def is_plain_name(text: str) -> bool:
    """Tell whether a file can be called so, in the folder where it belongs, with some suffix."""
    return (
        text.strip(" .") == text != ""
        and text.isprintable()
        and not {"/", "\\"} & set(text)
        and len(text.encode()) <= LONGEST_NAME
    )


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to, and move it into place on success.

    The parent folder is created, and what killed processes left there for `path` is removed. If
    the block raises, what it wrote is removed and whatever stood at `path` before is untouched.
    An error of the system's names `path`.
    """
    with _temporary(Path(path)) as partial:
        yield partial
        os.replace(partial, path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; as `atomic_path`."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, to move what is whole out of it; as `atomic_path`."""
    with _temporary(path) as staging:
        staging.mkdir()
        yield staging


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = leftover.suffixes[-2][1:]
        if pid.isdecimal() and not _is_running(int(pid)):
            _remove(leftover)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _remove(partial)  # of a killed process with the same number
    try:
        yield partial
    except OSError as error:
        # Writing names no file, and the temporary name would tell the user nothing.
        is_ours = error.filename is None or str(error.filename) == str(partial)
        if error.errno is not None and is_ours:
            error.filename = str(path)
        raise
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise OSError, which names it, if nothing can be written to a folder; it is made."""
    write_text(folder / ".writable", "")
    (folder / ".writable").unlink()


def _is_running(pid: int) -> bool:
    try:
        if os.name == "posix":  # elsewhere signal 0 is no question
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
