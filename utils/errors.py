"""Tell users of their mistakes in one line, with exit code 1 and no traceback."""

import errno
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

import torch

FEWER = "lower TRAIN.workers and TRAIN.workers_val"
SHM_REMEDY = f"give a container more (docker run --shm-size=8g), or {FEWER}; 0 needs none"
# Of processes, threads and files, in the words of the system, Python and torch.
LIMITS = (
    "Cannot allocate memory|Resource temporarily unavailable|Too many open files|"
    "can't start new thread"
)


class UserError(ValueError):
    """Something that the person at the terminal can put right; its text is one line saying how."""


def run_entry_point(main: Callable[[], None]) -> None:
    """Run an entry point, turning foreseen failures into `error: ...` and exit code 1.

    Foreseen are `UserError`, what the system refuses to do with a named file (no permission, no
    space, a file where a folder should be), that memory is short, and that a loader process was
    lost. Where nobody reads the output any more (`| head`), the program ends without a word.

    Args:
        main: the program; takes no arguments.

    `CRIS_TRACEBACK=1` in the environment shows the traceback all the same.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the program began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    with suppress(AttributeError):  # of a notebook, say
        sys.stdout.reconfigure(errors="backslashreplace")  # a file on Windows has few letters
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # what nobody reads is found out here, not when Python ends
    except BrokenPipeError:
        _drop(sys.stdout)
        _drop(sys.stderr)
        sys.exit(1)
    except (UserError, OSError, EOFError, RuntimeError, MemoryError) as error:
        line = _foreseen(error)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            line = f"the output could not be written: {error.strerror}"
            _drop(sys.stdout)
        if os.environ.get("CRIS_TRACEBACK") or line is None:
            raise
        sys.exit(f"error: {line}")
    except KeyboardInterrupt:
        sys.exit(130)


def _drop(stream: TextIO) -> None:
    """Send what is still written to nowhere: Python flushes its streams when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def loader_loss(error: Exception) -> str | None:
    """Return how a loader process was lost, with the remedy; None for another error."""
    text = str(error)
    if "can't allocate memory" not in text and (met := re.search(LIMITS, text)):
        return f"a limit of this machine was met ({met[0]}): {FEWER}, or raise it (see ulimit -a)"
    if "shared memory" in text or re.search(r"/torch_\w+>?: No space left", text):
        return f"a loader process found no room in /dev/shm: {SHM_REMEDY}"
    # Tensors are handed over by a socket, which a process takes along.
    is_cut = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    is_cut = is_cut and getattr(error, "filename", None) is None
    if is_cut or re.match(r"DataLoader worker \(pid.*\) (is killed|exited)", text):
        return f"a loader process was killed, perhaps because memory is short: {FEWER}"
    return None


def _foreseen(error: Exception) -> str | None:
    """Return the line for the person at the terminal; None for what nobody foresaw."""
    text = str(error)
    if isinstance(error, UserError):  # a loader process puts the traceback before it
        is_of_loader = re.match(r"Caught \w+ in DataLoader worker", text)
        return text.splitlines()[-1].partition(": ")[2] if is_of_loader else text
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    is_named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if is_named or "can't allocate memory" in text:  # torch's on the CPU
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        what = f" for {asked[1]} more" if asked else ""
        return (
            f"there is not enough memory{what}; lower TRAIN.batch_size or TRAIN.batch_size_val, or "
            "see docs/memory.md"
        )
    return loader_loss(error)
