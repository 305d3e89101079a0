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
    the block raises, the temporary file is removed and whatever stood at `path` before is
    untouched. An error of the system's names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial = _partial(path, os.getpid())
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        # Writing names no file, and the temporary name would tell the user nothing.
        is_ours = error.filename is None or str(error.filename) == str(partial)
        if error.errno is not None and is_ours:
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, to move what is whole out of it; it is removed.

    So is what killed processes left there for `path`. An error of the system's that names no file
    names `path`.
    """
    _remove_leftovers(path)
    staging = _partial(path, os.getpid())
    staging.mkdir(parents=True)
    try:
        yield staging
    except OSError as error:
        error.filename = error.filename or str(path)  # writing names no file
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raise OSError, which names it, if nothing can be written to a folder; it is made."""
    with atomic_path(folder / ".writable") as partial:
        partial.touch()
    (folder / ".writable").unlink()


def _partial(path: Path, pid: int) -> Path:
    return path.with_name(f".{path.name}.{pid}.partial")


def _remove_leftovers(path: Path) -> None:
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = partial.suffixes[-2][1:]
        if pid.isdecimal() and not _is_running(int(pid)):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        if os.name == "posix":  # elsewhere signal 0 is no question
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
