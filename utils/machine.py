"""What this machine lets a process use."""

import os


def available_cores() -> int:
    """Cores that this process may run on, which a container or a scheduler can limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
