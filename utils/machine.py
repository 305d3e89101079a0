"""What this machine lets a process use, and what the process uses."""

import os
import sys
from pathlib import Path

GIB = 2**30  # bytes


def available_cores() -> int:
    """Cores that this process may run on, which a container or a scheduler can limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees, instead of giving it back at once.

    A training step on a CPU frees its maps and asks for them anew, and the system clears every
    page of them again. Acts on the main thread's memory, which is where a step takes its own; the
    process stays as large as it has once been, some per cent above what it would have been, for
    what cannot be fitted together again. For whole programs: it cannot be undone. Without effect
    where the C library is not glibc.
    """
    import ctypes

    trim_threshold, mmap_max = -1, -4  # mallopt's numbers for M_TRIM_THRESHOLD, M_MMAP_MAX
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def resident_memory() -> int:
    """Bytes of memory that this process holds; its peak where the system tells no more (macOS)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory()


def peak_memory() -> int:
    """The most bytes that this process has held at a time."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's own account: getrusage's starts from the parent's
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    return peak_usage(resource.RUSAGE_SELF)


def peak_usage(who: int) -> int:
    """The same as the system accounts for it, such as of the ended children (RUSAGE_CHILDREN)."""
    import resource

    scale = 1 if sys.platform == "darwin" else 1024  # Linux counts it in KiB
    return resource.getrusage(who).ru_maxrss * scale
