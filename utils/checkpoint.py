"""Checkpoints: written whole or not at all, read without running anything that is in them."""

import json
import os
import pickle
import re
import shutil
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import atomic_path

LAST, BEST, STEPS = "last_model.pth", "best_model.pth", "step_*.pth"
WEIGHTS = ("state_dict", "model_state_dict", "model")  # the names of weights here and elsewhere


class ScalarType:
    """Stand in for the type of a numpy scalar while it is read."""

    def __init__(self, code: str, *_: bool) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def scalar(kind: ScalarType, data: bytes) -> complex | str | bytes:
    """Return a numpy scalar as a plain value: its bytes are read, and nothing else is made."""
    if not re.fullmatch("[=<>|]([biuf][1248]|c8|c16|[US][0-9]+)", kind.order + kind.code):
        raise ValueError(f"GLOBAL numpy.dtype.{kind.code}")  # as torch calls what it refuses
    return np.ndarray((), kind.order + kind.code, data).item()


EXPORTED = ("config", "no_target")  # what goes with weights alone
# What numpy's pickles name, in its versions 1 and 2.
ADMITTED = [
    (ScalarType, "numpy.dtype"),
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (lambda: b"", "builtins.bytes"),  # without arguments alone: any number of bytes could be asked
]


def save_checkpoint(state: dict, folder: Path, is_best: bool, keep: int = 0) -> None:
    """Write `last_model.pth`, and `best_model.pth` as a link to the same bytes if it is best.

    Args:
        state: tensors and plain containers only; `state_dict` holds the model's weights.
        folder: of the run.
        is_best: whether the model beats all before it.
        keep: link it as `step_<step>.pth` too, and keep the newest so many of those; 0: none.
    Raises:
        OSError: it could not be written; what was there before still is.
    """
    last = folder / LAST
    with atomic_path(last) as partial:
        _write(state, partial)
        if is_best:  # first: a run killed in between comes to this point again
            _link(partial, folder / BEST)
    if keep:
        _link(last, folder / f"step_{state['step']:08d}.pth")
        for old in _newest_first(folder.glob(STEPS))[keep:]:
            old.unlink(missing_ok=True)


def find_newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, if there is any; name newer ones that are torn.

    Every byte is compared with its checksum.

    Raises:
        UserError: all are torn.
    """
    paths = _newest_first(list_checkpoints(folder))
    for path in paths:
        if _is_whole(path):
            return path
        logger.warning(f"{path} is cut off or damaged, skipped")
    if paths:
        raise UserError(
            f"every checkpoint in {folder} is cut off or damaged; move them away to train anew"
        )
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints that a run has written there, whole or not."""
    return [path for path in (folder / LAST, folder / BEST, *folder.glob(STEPS)) if path.is_file()]


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda p: (p.name == LAST, p.stat().st_mtime_ns, p.name), reverse=True)


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError):
        return False


def _write(state: dict, path: Path) -> None:
    """Write to the disk itself: a machine that stops leaves the file whole or the one before."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch's own, raised while it handles the system's
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _link(source: Path, target: Path) -> None:
    with atomic_path(target) as partial:
        try:
            os.link(source, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, partial)


def read_checkpoint(path: str | Path, purpose: str) -> dict:
    """Read a checkpoint onto the CPU; only tensors, plain values and containers are admitted.

    The `module.` prefix that DataParallel and DistributedDataParallel leave on the names of
    weights is removed.

    Args:
        path: a checkpoint of ours or of the release, weights that `save_weights` wrote, or a bare
            dict of weights; they may also lie under `model` or `model_state_dict`.
        purpose: the config key that asked for it, for the error.
    Raises:
        UserError: missing, torn, asking for code, or without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{purpose}: there is no checkpoint {path}; train first, or name another")
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below, in one line
            state = _read(path)
    except Exception as error:  # a parser can stumble over foreign bytes in any way
        raise UserError(f"{purpose}: {path} {_fault(error, path)}") from None
    state = {"state_dict": state} if _are_weights(state) else state
    places = WEIGHTS if isinstance(state, dict) else ()
    place = next((name for name in places if _are_weights(state.get(name))), None)
    if place is None:
        raise UserError(f"{purpose}: {path} has no state_dict; it is no CRIS checkpoint")
    weights = state.pop(place)
    return state | {"state_dict": {k.removeprefix("module."): v for k, v in weights.items()}}


def _are_weights(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in value.items()
    )


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] != b"{":  # safetensors: eight bytes of length, then JSON
        with torch.serialization.safe_globals(ADMITTED):
            return torch.load(path, map_location="cpu", weights_only=True)
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        state = {"state_dict": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
        about = file.metadata() or {}
        return state | {key: json.loads(about[key]) for key in EXPORTED if key in about}


def save_weights(weights: Mapping[str, Tensor], about: Mapping, path: str | Path) -> None:
    """Write weights, and of what belongs to them `EXPORTED`, as safetensors; whole or not at all.

    `read_checkpoint` gives them back to the bit, under `state_dict` and these keys.
    """
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with atomic_path(path) as partial:
        metadata = {key: json.dumps(about[key]) for key in EXPORTED if key in about}
        partial.write_bytes(save(plain, metadata=metadata))


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy a checkpoint's weights into the unwrapped model; every name and shape must fit.

    Raises:
        UserError: keys are missing, unknown or of another shape; names the first ones.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        faults = textwrap.shorten(str(error).partition("\n")[2], 600, placeholder=" …")
        raise UserError(
            f"{source} does not fit the config's model: {faults} Use the config and the code that "
            "it was trained with"
        ) from None


def _fault(error: Exception, path: Path) -> str:
    """Why the file was not read, and what to do."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked or (isinstance(error, pickle.UnpicklingError) and _is_whole(path)):
        what = asked[1] if asked else "another pickle protocol or kind of object"
        return (
            f"asks for {what}, which weights do not need: refused, and none of it was run; "
            "save it again as tensors and plain containers"
        )
    if "TorchScript" in str(error):
        return "is a TorchScript archive; if it is a CLIP, give it as TRAIN.clip_pretrain"
    return (
        f"is cut off, damaged or no checkpoint ({type(error).__name__} in its "
        f"{path.stat().st_size} bytes); copy it again, or name another"
    )
