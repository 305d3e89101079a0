"""Write files that are either whole or not there."""

import glob
import os
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

    The parent folder is created. If the block raises, the temporary file is removed and
    whatever stood at `path` before is untouched. An error of the system's names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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


def check_writable(folder: Path) -> None:
    """Raise OSError, which names it, if nothing can be written to a folder; it is made."""
    with atomic_path(folder / ".writable") as partial:
        partial.touch()
    (folder / ".writable").unlink()


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary files for `path` of processes that were killed; nobody reads them."""
    path = Path(path)
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = partial.name.removesuffix(".partial").rpartition(".")[2]
        if pid.isdecimal() and partial == _partial(path, int(pid)) and not _is_running(int(pid)):
            partial.unlink(missing_ok=True)


def _partial(path: Path, pid: int) -> Path:
    return path.with_name(f".{path.name}.{pid}.partial")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no process id at all
        pass
    return True
