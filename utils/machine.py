"""What this machine lets a process use, and what the process uses."""

import os
from pathlib import Path


def available_cores() -> int:
    """Cores that this process may run on, which a container or a scheduler can limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_memory() -> int:
    """Bytes of memory that this process holds; its peak where the system tells no more (macOS)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
