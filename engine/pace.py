"""How fast a training goes, how long it waits for its data, and what memory it takes."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from utils.distributed import gather_objects
from utils.machine import GIB, resident_memory

# What a lap measures: it differs from run to run, as nothing else in the records does.
MEASURED = ("refs_per_second", "data_wait_share", "memory_gib")
_END = object()


class Pace:
    """Takes the time from one line in the log to the next. Never waits for the device itself.

    Args:
        device: whose memory counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._restart()

    def _restart(self) -> None:
        self._start, self._waited, self._batches = time.monotonic(), 0.0, 0

    def watch(self, batches: Iterable) -> Iterator[Any]:
        """Go through a loader, counting its batches and the seconds until each is there."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            batch = next(iterator, _END)
            self._waited += time.monotonic() - asked
            if batch is _END:
                return
            self._batches += 1
            yield batch

    def lap(self, batch_size: int) -> dict[str, float]:
        """Return what was measured since the last lap, named as in `MEASURED`; all ranks call it.

        A GPU may still compute while the host waits for data, so there the share is the most that
        faster loading could save.

        Args:
            batch_size: refs in a batch, those of all ranks together.
        Returns:
            Refs a second; the share of the time in [0, 1] in which the loop waited for the loader,
            on the rank that waited longest; the GiB that the fullest device has held at most, or
            on the CPU what the largest rank's process holds, without its loaders.
        """
        seconds = max(time.monotonic() - self._start, 1e-9)
        own = self._waited / seconds, memory_in_use(self._device)
        waited, memory = map(max, zip(*gather_objects(own), strict=True))
        speed = batch_size * self._batches / seconds
        self._restart()
        return dict(zip(MEASURED, (speed, waited, memory), strict=True))


def memory_in_use(device: torch.device) -> float:
    """GiB: the most that tensors have taken on a GPU, or the memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resident_memory() / GIB
