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
    """Give learning rates by progress; it keeps no state, so resuming is free.

    As in the release, the first epoch trains **every** group at the base rate: the groups set only
    `initial_lr`, which takes effect when the schedule is stepped for the first time.
    `backbone_start` "lr_multi" gives each group its own rate from the start instead.

    Args:
        optimizer: whose groups have `initial_lr`.
        base_lr: the rate of the first epoch.
        milestones: epochs (from 0) from which the rate is multiplied by `decay` once more.
        decay: factor.
        cosine_epochs: over which the rates fall along half a cosine to 0 instead of at milestones;
            0: milestones, as published.
        warmup_steps: optimiser steps over which the rates rise linearly from 0; 0 as published.
        backbone_start: "published" or "lr_multi", see above.
    """

    optimizer: optim.Optimizer
    base_lr: float
    milestones: Sequence[int]
    decay: float
    cosine_epochs: int = 0
    warmup_steps: int = 0
    backbone_start: str = "published"

    def rates(self, progress: float, step: int) -> list[float]:
        """Return the rate of each group.

        Args:
            progress: epochs of the run that are done, with the share of the present one.
            step: optimiser steps taken in the run, for the warm-up.
        """
        if self.cosine_epochs:  # the cosine would rise again after its end
            drop = (1 + math.cos(math.pi * min(1.0, progress / self.cosine_epochs))) / 2
        else:
            drop = self.decay ** sum(progress >= milestone for milestone in self.milestones)
        ramp = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        at_base = progress < 1 and self.backbone_start == "published"
        return [
            (self.base_lr if at_base else group["initial_lr"]) * drop * ramp
            for group in self.optimizer.param_groups
        ]

    def set(self, progress: float, step: int) -> None:
        """Give the optimiser the rates of this step."""
        rates = self.rates(progress, step)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def build_schedule(optimizer: optim.Optimizer, cfg) -> Schedule:
    """The schedule that the config's TRAIN section describes."""
    train = cfg.TRAIN
    return Schedule(
        optimizer,
        train.base_lr,
        train.milestones,
        train.lr_decay,
        train.epochs if train.schedule == "cosine" else 0,
        train.warmup_steps,
        train.backbone_start,
    )
