"""Parameter groups, optimiser and learning-rate schedule of CRIS (surprises: docs/ledger.md)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn, optim

BACKBONE, HEAD = "backbone", "head"


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
    backbone = {"name": BACKBONE, "params": [], "initial_lr": base_lr * cfg.TRAIN.lr_multi}
    head = {"name": HEAD, "params": [], "initial_lr": base_lr}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_backbone = name.startswith("backbone") and "positional_embedding" not in name
            (backbone if is_backbone else head)["params"].append(parameter)
    return [backbone, head]


def build_optimizer(groups: list[dict], cfg) -> optim.Optimizer:
    """Adam over all groups at `TRAIN.base_lr`; the schedule sets the rates of each epoch."""
    return optim.Adam(groups, lr=cfg.TRAIN.base_lr, weight_decay=cfg.TRAIN.weight_decay, fused=True)


@dataclass(frozen=True)
class Schedule:
    """Give learning rates by epoch and step; it keeps no state, so resuming is free.

    As in the release, the first epoch trains **every** group at the base rate: the groups set only
    `initial_lr`, which takes effect when the schedule is stepped for the first time.
    `backbone_start` "lr_multi" gives each group its own rate from the start instead.

    Args:
        optimizer: whose groups have `initial_lr`.
        base_lr: the rate of the first epoch.
        milestones: epochs (from 0) from which the rate is multiplied by `decay` once more.
        decay: factor.
        cosine_steps: optimiser steps of the whole run, over which the rates fall along half a
            cosine to 0 instead of at milestones; 0: milestones, as published.
        warmup_steps: optimiser steps over which the rates rise linearly from 0; 0 as published.
        backbone_start: "published" or "lr_multi", see above.
    """

    optimizer: optim.Optimizer
    base_lr: float
    milestones: Sequence[int]
    decay: float
    cosine_steps: int = 0
    warmup_steps: int = 0
    backbone_start: str = "published"

    def rates(self, epoch: int, step: int) -> list[float]:
        """The rate of each group at optimiser step `step` (of the whole run), both from 0."""
        if self.cosine_steps:
            drop = (1 + math.cos(math.pi * step / self.cosine_steps)) / 2
        else:
            drop = self.decay ** sum(epoch >= milestone for milestone in self.milestones)
        ramp = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        at_base = epoch == 0 and self.backbone_start == "published"
        return [
            (self.base_lr if at_base else group["initial_lr"]) * drop * ramp
            for group in self.optimizer.param_groups
        ]

    def set(self, epoch: int, step: int) -> None:
        """Give the optimiser the rates of this step."""
        for group, rate in zip(self.optimizer.param_groups, self.rates(epoch, step), strict=True):
            group["lr"] = rate


def build_schedule(optimizer: optim.Optimizer, cfg, steps_per_epoch: int) -> Schedule:
    """The schedule that the config's TRAIN section describes."""
    train = cfg.TRAIN
    return Schedule(
        optimizer,
        train.base_lr,
        train.milestones,
        train.lr_decay,
        train.epochs * steps_per_epoch if train.schedule == "cosine" else 0,
        train.warmup_steps,
        train.backbone_start,
    )
