"""Checkpoints: written whole or not at all, read without running anything that is in them."""

import os
import re
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import atomic_path

LAST, BEST = "last_model.pth", "best_model.pth"


def save_checkpoint(state: dict, folder: str | Path, is_best: bool) -> None:
    """Write `last_model.pth`, and `best_model.pth` as a link to the same bytes if it is best.

    Args:
        state: tensors and plain containers only; `state_dict` holds the model's weights.
        folder: of the run.
        is_best: whether the model beats all before it.
    """
    last, best = Path(folder) / LAST, Path(folder) / BEST
    with atomic_path(last) as partial:
        torch.save(state, partial)
    if is_best:
        with atomic_path(best) as partial:
            try:
                os.link(last, partial)
            except OSError:  # a file system without hard links
                shutil.copyfile(last, partial)


def read_checkpoint(path: str | Path, purpose: str) -> dict:
    """Read a checkpoint onto the CPU; nothing but tensors and plain containers is admitted.

    The `module.` prefix that DataParallel and DistributedDataParallel leave on the names of
    weights is removed.

    Args:
        path: a checkpoint of ours, or an official one.
        purpose: the config key that asked for it, for the error.
    Raises:
        UserError: missing, torn, asking for code, or without a `state_dict`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{purpose}: there is no checkpoint {path}; train first, or name another")
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below, in one line
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser can stumble over foreign bytes in any way
        raise UserError(f"{purpose}: {path} {_fault(error, path)}") from None
    weights = state.get("state_dict") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise UserError(f"{purpose}: {path} has no state_dict; it is no CRIS checkpoint")
    return state | {"state_dict": {k.removeprefix("module."): v for k, v in weights.items()}}


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy a checkpoint's weights into the unwrapped model; every name and shape must fit.

    Raises:
        UserError: keys are missing, unknown or of another shape; lists them.
    """
    own = model.state_dict()
    faults = [f"missing {key}" for key in own if key not in weights]
    faults += [f"unknown {key}" for key in weights if key not in own]
    faults += [
        f"{key} is {_shape(weights[key])}, the model has {_shape(own[key])}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(
            f"{source} does not fit the config's model: {'; '.join(faults[:8])}{more}; "
            "use the config that it was trained with"
        )
    model.load_state_dict(weights)


def _fault(error: Exception, path: Path) -> str:
    """Why the file was not read, and what to do."""
    if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"asks for {asked[1]}, which weights do not need: refused, and none of it was run; "
            "save it again as tensors and plain containers"
        )
    if "TorchScript" in str(error):
        return "is a TorchScript archive; if it is a CLIP, give it as TRAIN.clip_pretrain"
    return (
        f"is cut off, damaged or no checkpoint ({type(error).__name__} in its "
        f"{path.stat().st_size} bytes); copy it again, or name another"
    )


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"
