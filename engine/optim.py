"""Parameter groups, optimiser and learning-rate schedule of CRIS (surprises: docs/ledger.md)."""

import math

from torch import nn, optim


def parameter_groups(model: nn.Module, cfg) -> list[dict]:
    """Split the trained parameters as the release does.

    Args:
        model: the unwrapped segmenter.
        cfg: the whole config; `TRAIN.base_lr` and `TRAIN.lr_multi` are read.
    Returns:
        Two groups with `name`, `params` and `initial_lr`: **backbone** is what starts with
        `backbone` and is no positional embedding, **head** all the rest.
    """
    base_lr = cfg.TRAIN.base_lr
    backbone = {"name": "backbone", "params": [], "initial_lr": base_lr * cfg.TRAIN.lr_multi}
    head = {"name": "head", "params": [], "initial_lr": base_lr}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_backbone = name.startswith("backbone") and "positional_embedding" not in name
            (backbone if is_backbone else head)["params"].append(parameter)
    return [backbone, head]


def build_optimizer(groups: list[dict], cfg) -> optim.Optimizer:
    """Adam over all groups at `TRAIN.base_lr`; `set_rates` sets the rates of each step."""
    return optim.Adam(groups, lr=cfg.TRAIN.base_lr, weight_decay=cfg.TRAIN.weight_decay, fused=True)


def set_rates(optimizer: optim.Optimizer, cfg, progress: float, step: int) -> None:
    """Give each group its learning rate, which depends on no state: resuming is free.

    As in the release, the first epoch trains **every** group at the base rate: the groups set only
    `initial_lr`, which takes effect when the schedule is stepped for the first time.
    `TRAIN.backbone_start` "lr_multi" gives each group its own rate from the start instead.

    Args:
        optimizer: whose groups have `initial_lr`.
        cfg: the whole config; the schedule in its TRAIN section is read.
        progress: epochs of the run that are done, with the share of the present one.
        step: optimiser steps taken in the run, for the warm-up.
    """
    train = cfg.TRAIN
    if train.schedule == "cosine":  # it would rise again after its end
        drop = (1 + math.cos(math.pi * min(1.0, progress / train.epochs))) / 2
    else:
        drop = train.lr_decay ** sum(progress >= milestone for milestone in train.milestones)
    ramp = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    at_base = progress < 1 and train.backbone_start == "published"
    for group in optimizer.param_groups:
        group["lr"] = (train.base_lr if at_base else group["initial_lr"]) * drop * ramp
