"""What a run says: lines for people (loguru), records for programs, and Weights & Biases.

This is the only file that names Weights & Biases, and it imports it only when it is asked for.
"""

import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from loguru import logger
from tqdm import tqdm

from utils.files import atomic_path

LOG, METRICS = "train.log", "metrics.jsonl"  # in the folder of a run
TERMINAL_FORMAT = "<green>{time:HH:mm:ss}</green> <level>{message}</level>"
FILE_FORMAT = "{time:YYYY-MM-DD HH:mm:ss} {level: <7} {message}"


def setup_logging(folder: str | Path | None, is_main: bool) -> None:
    """Send log lines to the terminal and, in a run, to `train.log`; other ranks stay silent.

    Args:
        folder: of the run, or None for the terminal alone.
        is_main: whether this is rank 0.
    """
    logger.remove()
    if not is_main:
        return
    # Through tqdm, so that a line does not tear the progress bar.
    logger.add(
        lambda line: tqdm.write(line, file=sys.stderr, end=""),
        format=TERMINAL_FORMAT,
        colorize=sys.stderr.isatty(),
    )
    if folder is not None:
        # delay: a run that fails before it has anything to say leaves no folder behind.
        logger.add(Path(folder) / LOG, format=FILE_FORMAT, delay=True, encoding="utf-8")


def progress(iterable, total: int, description: str, show: bool = True, done: int = 0):
    """A bar with rate and ETA on a terminal; elsewhere nothing, the log lines carry the progress.

    Args:
        iterable: what to go through; `bar.set_postfix_str` shows numbers beside it.
        total: its length.
        description: in front of the bar.
        show: False on ranks other than 0.
        done: how much of it was gone through before.
    """
    hidden = not (show and sys.stderr.isatty())
    return tqdm(iterable, total=total, desc=description, disable=hidden, leave=False, initial=done)


def duration(seconds: float) -> str:
    """Seconds as a person says them: `47 s`, `12 min`, `3 h 05 min`."""
    minutes, hours = round(seconds / 60), int(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if hours == 0 else f"{minutes // 60} h {minutes % 60:02d} min"


def _keep_records(path: Path, keep: Callable[[dict], bool]) -> None:
    """Drop the other records, and what a killed process wrote of one."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        with suppress(ValueError):
            if line.endswith("\n") and keep(json.loads(line)):
                kept.append(line)
    with atomic_path(path) as partial:
        partial.write_text("".join(kept))


class Tracker:
    """Appends records to `metrics.jsonl` and, if asked, to Weights & Biases.

    Args:
        folder: of the run; None makes a tracker that does nothing (ranks other than 0).
        wandb_mode: "disabled", "offline" or "online".
        name, config: what Weights & Biases shows.
        keep: of a run that is resumed, which of its records to go on from; None starts anew.
    """

    def __init__(
        self,
        folder: Path | None,
        wandb_mode: str = "disabled",
        name: str = "",
        config: dict | None = None,
        keep: Callable[[dict], bool] | None = None,
    ) -> None:
        self._file = self._wandb = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        if keep is not None and path.exists():
            _keep_records(path, keep)
        self._file = path.open("w" if keep is None else "a")
        if wandb_mode != "disabled":
            import wandb

            self._wandb = wandb.init(
                project="CRIS", name=name, mode=wandb_mode, dir=folder, config=config
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._flush()
            with suppress(OSError):  # what has no room now has been told of
                self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _flush(self) -> None:
        """A full disk ends no training: what could not be written goes with the next record."""
        try:
            self._file.flush()
        except OSError as error:
            logger.error(f"{self._file.name}: {error.strerror}; its records wait for room")

    def log(self, kind: str, record: dict) -> None:
        """Write one record: `kind` is "step" or "epoch", `record` plain numbers by name."""
        if self._file is None:
            return
        # JSON has no NaN and no infinity.
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps({"kind": kind, **plain}, allow_nan=False) + "\n")
        self._flush()
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{key}": value for key, value in record.items()})
