"""What a run says: lines for people (loguru), records for programs, and Weights & Biases.

This is the only file that names Weights & Biases, and it imports it only when it is asked for.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from loguru import logger
from PIL.Image import Image
from tqdm import tqdm

from utils.errors import UserError
from utils.files import write_text

LOG, METRICS = "train.log", "metrics.jsonl"  # in the folder of a run
WANDB_RUN = "wandb_run"  # beside them: the id by which Weights & Biases knows the run


def setup_logging(folder: str | Path | None, is_main: bool) -> None:
    """Send log lines to the terminal and, in a run, to `train.log`; other ranks stay silent.

    Args:
        folder: of the run, or None for the terminal alone.
        is_main: whether this is rank 0.
    """
    logger.remove()
    if not is_main:
        return
    logger.add(
        lambda line: tqdm.write(line, file=sys.stderr, end=""),  # above a progress bar
        format="<green>{time:HH:mm:ss}</green> <level>{message}</level>",
        colorize=sys.stderr.isatty(),
    )
    if folder is not None:
        # Made with the first line. Without `catch`, what cannot be written is an error.
        line = "{time:YYYY-MM-DD HH:mm:ss} {level: <7} {message}"
        logger.add(Path(folder) / LOG, format=line, encoding="utf-8", delay=True, catch=False)


def progress(iterable, total: int, description: str, show: bool = True, done: int = 0):
    """Go through `iterable` with a bar of rate and ETA; without a terminal there is no bar.

    Args:
        show: False on ranks other than 0.
        done: how much of `total` was gone through before.
    """
    hidden = not (show and sys.stderr.isatty())
    return tqdm(iterable, total=total, desc=description, disable=hidden, leave=False, initial=done)


def duration(seconds: float) -> str:
    """Return seconds as a person says them: `47 s`, `12 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _keep_records(path: Path, last: Mapping) -> int:
    """Drop later records, and what a killed process left of a line; count what stays."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(line)
            if line.endswith("\n") and record[record["kind"]] <= last[record["kind"]]:
                kept.append(line)
    write_text(path, "".join(kept))
    return len(kept)


class Tracker:
    """Appends records to `metrics.jsonl` and, if asked, to Weights & Biases.

    Args:
        folder: of the run; None makes a tracker that does nothing (ranks other than 0).
        wandb_mode: "disabled", "offline" or "online".
        name, config: what Weights & Biases shows.
        last: of a resumed run, whose later records go: its last step and epoch; None starts anew.
    """

    def __init__(
        self,
        folder: Path | None,
        wandb_mode: str = "disabled",
        name: str = "",
        config: dict | None = None,
        last: Mapping | None = None,
    ) -> None:
        self._file = self._wandb = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if wandb_mode != "disabled":  # first: nothing has been changed yet if it cannot start
            self._wandb = _start_wandb(folder, wandb_mode, name, config, last is not None)
        path, self._records = folder / METRICS, 0
        if last is not None and path.exists():
            self._records = _keep_records(path, last)
        self._file = path.open("w" if last is None else "a", buffering=1)  # a line at once

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._tell_wandb("finish", exit_code=0 if kind is None else 1)

    def log(self, kind: str, record: dict) -> None:
        """Write one record: `kind` is "step" or "epoch", `record` plain numbers by name."""
        if self._file is None:
            return
        plain = {  # JSON has no NaN and no infinity
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps({"kind": kind, **plain}, allow_nan=False) + "\n")
        named = {f"{kind}/{key}": value for key, value in record.items()}
        # W&B's own counter begins at 0 in each start.
        self._tell_wandb("log", named, step=self._records, commit=True)
        self._records += 1

    def _tell_wandb(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of W&B's run, if there is one; where it fails, go on without it."""
        try:
            if self._wandb is not None:
                getattr(self._wandb, method)(*args, **kwargs)
        except Exception as error:  # its process may be killed, say
            logger.warning(f"Weights & Biases has failed ({error}): the run goes on without it")
            self._wandb = None

    def show(self, epoch: int, pictures: Sequence[tuple[str, Image]]) -> None:
        """Give Weights & Biases pictures with their captions, the same number in every epoch."""
        if self._wandb is None:
            return
        import wandb

        images = {  # a name each, as pictures under one name must be of one size
            f"epoch/sentence_{number}": wandb.Image(picture, caption=caption)
            for number, (caption, picture) in enumerate(pictures, start=1)
        }
        self._tell_wandb("log", {"epoch/epoch": epoch, **images}, step=self._records)


def _start_wandb(folder: Path, mode: str, name: str, config: dict | None, goes_on: bool) -> Any:
    """Start a run at Weights & Biases, or go on with the one that this folder belongs to.

    Raises:
        UserError: it is not installed or cannot be reached, or nobody is logged in.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError(
            f"TRAIN.wandb {mode}: the package {error.name} is not here; pip install {error.name}"
        ) from None
    file = folder / WANDB_RUN
    known = file.read_text().strip() if goes_on and file.exists() else None
    try:
        run = wandb.init(
            project="CRIS",
            name=name,
            mode=mode,
            dir=folder,
            config=config,
            id=known or None,
            resume="allow",
            allow_val_change=True,
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"TRAIN.wandb {mode}: {reason}; offline needs no account") from None
    # The count of records is no axis.
    for kind in ("step", "epoch"):
        run.define_metric(f"{kind}/*", step_metric=f"{kind}/{kind}")
    write_text(file, f"{run.id}\n")
    return run
