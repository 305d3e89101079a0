"""How fast a training goes, how long it waits for its data, and what memory it takes."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from utils.distributed import gather_objects
from utils.machine import GIB, peak_memory

# What a lap measures: it differs from run to run, as nothing else in the records does.
MEASURED = ("refs_per_second", "data_wait_share", "memory_gib")


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
        asked = time.monotonic()
        for batch in batches:
            self._waited += time.monotonic() - asked
            self._batches += 1
            yield batch
            asked = time.monotonic()

    def lap(self, batch_size: int) -> dict[str, float]:
        """Return what was measured since the last lap, named as in `MEASURED`; all ranks call it.

        Args:
            batch_size: refs in a batch, those of all ranks together.
        Returns:
            Refs a second; the share of the time in [0, 1] in which the loop waited for the loader,
            on the rank that waited longest (a GPU may still compute then); the most GiB that the
            tensors of any rank's GPU have taken, or its process on a CPU, without loaders.
        """
        seconds = max(time.monotonic() - self._start, 1e-9)
        own = self._waited / seconds, memory_in_use(self._device)
        waited, memory = map(max, zip(*gather_objects(own), strict=True))
        speed = batch_size * self._batches / seconds
        self._restart()
        return dict(zip(MEASURED, (speed, waited, memory), strict=True))


def memory_in_use(device: torch.device) -> float:
    """Return the most GiB so far: of a GPU's tensors, or of this process."""
    on_gpu = device.type == "cuda"
    return (torch.cuda.max_memory_allocated(device) if on_gpu else peak_memory()) / GIB
