"""Files that one process holds at a time."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def check_locks() -> None:
    """Raise UserError where files cannot be locked, so that two runs could write one folder."""
    if fcntl is None:
        raise UserError(
            "training is supported on Linux and macOS, not on a system without file locks "
            "(Windows: use WSL); predict, test, export and the demo run here"
        )


@contextmanager
def hold(path: Path, on_busy: Callable[[], object], patience: float = 0.0) -> Iterator[None]:
    """Hold a lock that other processes respect; a killed holder frees it.

    A holder's forked children hold it too, until they have noticed that their parent is gone.

    Args:
        path: a file in a folder that exists; made if it is not there, and not written to.
        on_busy: called if another process still has it, or has removed it; raises to give up,
            returns to wait on.
        patience: seconds before that.
    """
    deadline = time.monotonic() + patience
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    on_busy()
                    deadline = math.inf
                time.sleep(0.1)
            except OSError as error:  # a file system without locks
                text = f"cannot be locked: {error.strerror}"
                raise OSError(error.errno, text, str(path)) from None
        if os.fstat(file.fileno()).st_nlink == 0:  # others may hold a file in its place
            on_busy()
        yield
