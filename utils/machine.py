"""Tell what this machine lets a process use, and what the process uses."""

import ctypes
import os
import sys
from pathlib import Path

GIB = 2**30  # bytes


def available_cores() -> int:
    """Return the cores that this process may use; a container or a scheduler can limit them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees, instead of giving it back to the system at once.

    A training step on a CPU frees its maps and asks for them anew, and the system would clear every
    page again. It cannot be undone; where the C library is another one, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


def peak_memory() -> int:
    """Return the most bytes that this process has held at a time."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's own account: getrusage's starts from the parent's
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource  # which Windows lacks

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
