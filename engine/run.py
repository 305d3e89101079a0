"""What a training consists of, and how far it is."""

import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils.config import Config
from utils.distributed import Ranks
from utils.logger import Tracker
from utils.signals import StopRequest
from utils.transforms import Protocol

PICTURES = "pictures"  # in the run's folder: a sheet after each validation


def code_version() -> str | None:
    """The commit that runs, `-dirty` if files differ from it; None where git does not say."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    try:
        ending = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ending.stdout.strip() or None


@dataclass
class Run:
    """A training on this rank.

    `model` is wrapped for its ranks. `protocols` holds the one that validation scores by, which
    decides what checkpoint is best. `best` is in [0, 1].

    `epoch` counts complete epochs, with their validation; `position` the steps of the one after
    them, and `step` all steps of the run. `reached` is the progress of the run that is resumed.
    `sums` is (2, 4) on the device, the sums of loss, IoU, Pr@0.5 and 1 over the refs of this epoch
    up to the last line in the log, and since. `faults` is (3,) int64 on the device: steps left out
    since that line, how many the last ones are in a row, and the position of the first (from 1; 0:
    none). `told` is the step of the log's last line about steps.
    """

    cfg: Config
    ranks: Ranks
    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    train_loader: DataLoader
    val_loader: DataLoader
    protocols: Mapping[str, Protocol]
    tracker: Tracker
    epoch: int = 0
    step: int = 0
    position: int = 0
    reached: float = 0.0
    best: float = -1.0
    sums: Tensor = field(init=False)
    faults: Tensor = field(init=False)
    told: int | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    saved_at: float = field(default_factory=time.monotonic)
    version: str | None = field(default_factory=code_version)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(2, 4, device=self.ranks.device)
        self.faults = torch.zeros(3, dtype=torch.int64, device=self.ranks.device)

    @property
    def length(self) -> int:
        """Return the steps of an epoch."""
        return len(self.train_loader) // self.cfg.TRAIN.accumulation_steps

    @property
    def progress(self) -> float:
        """Return the epochs done; refs that come again after resuming turn nothing back."""
        return max(self.reached, self.epoch + self.position / self.length)
