"""From a config to a model on its device, fresh or from a checkpoint."""

from pathlib import Path

import torch

from engine.checks import check_checkpoint
from model.clip_archive import ArchiveError
from model.segmenter import Segmenter, build_segmenter
from utils.checkpoint import BEST, load_weights, read_checkpoint
from utils.config import Config, check_clip_dims
from utils.distributed import start
from utils.errors import UserError
from utils.machine import keep_freed_memory
from utils.tokenizer import END_ID


def build_model(cfg: Config, device: torch.device) -> Segmenter:
    """Build the config's model as training starts it: CLIP's weights, the rest initialised.

    Raises:
        UserError: no CLIP is named, its archive cannot be used, or the config's widths do not fit
            it.
    """
    try:
        model = build_segmenter(cfg)
    except ArchiveError as error:
        raise UserError(f"TRAIN.clip_pretrain: {error}") from error
    except ValueError as error:  # the model layer knows no UserError
        raise UserError(str(error)) from error
    return _place(model, cfg, device)


def restore_model(
    cfg: Config, device: torch.device, path: str, purpose: str
) -> tuple[Segmenter, dict]:
    """Build the config's model with a checkpoint's weights; no CLIP archive is needed for it.

    Args:
        path: a checkpoint, ours or the release's.
        purpose: the config key that names it, for errors.
    Returns:
        The model and the rest of what the checkpoint holds.
    Raises:
        UserError: the checkpoint cannot be read, or does not fit the config.
    """
    state = read_checkpoint(path, purpose)
    weights = state.pop("state_dict")
    prefix = "backbone."
    clip = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not clip:
        raise UserError(f"{purpose}: {path} has no backbone; it is no CRIS checkpoint")
    try:
        model = build_segmenter(cfg, clip if cfg.TRAIN.clip_arch is None else None)
    except ValueError as error:
        raise UserError(f"{purpose}: {path}: {error}") from error
    load_weights(model, weights, path)
    return _place(model, cfg, device), state


def restore_trained(
    cfg: Config, device: torch.device, weights: str | Path | None, purpose: str
) -> tuple[Segmenter, str, dict]:
    """Return the config's trained model, the path of its checkpoint, and what else that holds.

    Args:
        weights: of the checkpoint; None: `TEST.weights`, or else the best one of the run.
        purpose, Raises: as for `restore_model`.
    """
    path = str(weights or cfg.TEST.weights or cfg.run_folder / BEST)
    model, state = restore_model(cfg, device, path, purpose)
    check_checkpoint(cfg, state, path, is_training=False)
    return model, path, state


def find_device(name: str | torch.device | None, purpose: str) -> torch.device:
    """Return the device asked for, or the first GPU, if there is one.

    Args:
        purpose: what asks for it, for the error.
    Raises:
        UserError: it is none, or is not there.
    """
    if name is None:
        return start(alone=True).device
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        fault = f"it cannot be used here ({str(error).splitlines()[0]})"
        raise UserError(f"{purpose} {name}: {fault}; cpu always can") from None
    return device


def settle_memory(cfg: Config, device: torch.device) -> None:
    """Keep freed memory for training on a CPU, unless the config recomputes to need less."""
    recomputes = cfg.TRAIN.recompute_backbone or cfg.TRAIN.recompute_decoder
    if device.type == "cpu" and not recomputes:
        keep_freed_memory()


def compile_model(model: Segmenter, device: torch.device) -> None:
    """Let `model(...)` be compiled in place when it is first called, for one shape of batch.

    `encode_image` and `segment`, which evaluation calls, stay as they are: scores do not change.

    Raises:
        UserError: there is no compiler here; found by compiling a line.
    """
    try:
        torch.compile(lambda x: x + x, dynamic=False)(torch.ones(1, device=device))
    except Exception as error:  # compilers fail in many ways
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"TRAIN.compile: torch.compile does not work here ({reason}); install a C++ compiler "
            "(g++, or name one in CXX), or set TRAIN.compile to false"
        ) from None
    model.compile(dynamic=False)


def _place(model: Segmenter, cfg: Config, device: torch.device) -> Segmenter:
    check_clip_dims(cfg.TRAIN, model.sizes)
    if model.sizes.vocab_size <= END_ID:
        raise UserError(
            f"the CLIP has {model.sizes.vocab_size} tokens, its tokenizer {END_ID + 1}: "
            "set TRAIN.clip_arch.vocab_size to that"
        )
    model.backbone.token_embedding.requires_grad_(not cfg.TRAIN.freeze_token_embedding)
    # Convolutions run faster on pixels whose channels lie side by side, on CPU and CUDA alike.
    return model.to(device, memory_format=torch.channels_last)
