"""The training loop: `fit` goes through epochs, `train_one_epoch` through steps."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engine.evaluator import evaluate, summarize_scores
from engine.optim import Schedule
from model.loss import resize_target, text_to_pixel_loss
from utils.checkpoint import save_checkpoint
from utils.config import Config, to_dict
from utils.dataset import TrainingBatch
from utils.distributed import (
    Ranks,
    gather_objects,
    mean_over_ranks,
    no_sync,
    share_buffers,
    unwrap,
)
from utils.errors import UserError
from utils.logger import Tracker, duration, progress
from utils.metrics import training_scores
from utils.seed import rng_state, set_rng_state
from utils.transforms import Protocol, normalize_images, normalize_masks

# As `training_scores` measures them, on the small map; validation has the plain names.
TRAINING_METRICS = ("loss", "train_mIoU", "train_Pr@0.5")
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Run:
    """What a training consists of, and how far it is.

    `model` is wrapped for its ranks. `protocols` holds the one that validation scores by, which
    decides what checkpoint is best. `epoch` and `step` count what is complete, `best` is in [0, 1].
    """

    cfg: Config
    ranks: Ranks
    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    train_loader: DataLoader
    val_loader: DataLoader
    protocols: Mapping[str, Protocol]
    tracker: Tracker
    epoch: int = 0
    step: int = 0
    best: float = -1.0


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that the forward pass computes in; "auto" is fp16 on CUDA, fp32 on the CPU."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return PRECISIONS[name]


def build_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling, which only fp16 needs; disabled it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def fit(run: Run) -> float:
    """Train from `run.epoch` to the last epoch; validate and save every `TRAIN.val_freq` epochs.

    Returns:
        The best validation mIoU, in [0, 1].
    """
    epochs, first, start = run.cfg.TRAIN.epochs, run.epoch, time.monotonic()
    for epoch in range(first, epochs):
        losses = train_one_epoch(run, epoch)
        run.epoch = epoch + 1
        if run.epoch % run.cfg.TRAIN.val_freq and run.epoch < epochs:
            run.tracker.log("epoch", {"epoch": run.epoch, "step": run.step, **losses})
            logger.info(f"epoch {run.epoch}/{epochs}: loss {losses['loss']:.4f}")
            continue
        scores = validate(run)
        is_best = scores["mIoU"] > run.best
        run.best = max(run.best, scores["mIoU"])
        run.tracker.log("epoch", {"epoch": run.epoch, "step": run.step, **losses, **scores})
        save(run, scores, is_best)
        left = (time.monotonic() - start) / (run.epoch - first) * (epochs - run.epoch)
        logger.info(
            f"epoch {run.epoch}/{epochs}: loss {losses['loss']:.4f}, "
            f"{run.cfg.DATA.val_split} mIoU {100 * scores['mIoU']:.2f}, "
            f"Pr@0.5 {100 * scores['Pr@0.5']:.2f}{' (best)' if is_best else ''}, "
            f"{duration(left)} left"
        )
    return run.best


def train_one_epoch(run: Run, epoch: int) -> dict[str, float]:
    """One pass over the refs.

    The host waits for the device only when it logs: until then sums stay on the device.

    Returns:
        Means over the epoch and all ranks, by the names of `TRAINING_METRICS`.
    """
    train, device = run.cfg.TRAIN, run.ranks.device
    run.model.train()
    run.train_loader.batch_sampler.set_epoch(epoch)
    total, window = torch.zeros(3, device=device), torch.zeros(3, device=device)
    steps = len(run.train_loader) // train.accumulation_steps
    bar = progress(run.train_loader, len(run.train_loader), f"epoch {epoch + 1}", run.ranks.is_main)
    window_start = time.monotonic()
    for count, batch in enumerate(bar, start=1):
        completes = count % train.accumulation_steps == 0
        if (count - 1) % train.accumulation_steps == 0:
            run.schedule.set(epoch, run.step)
        window += forward_backward(run, batch, synchronize=completes)
        if not completes:
            continue
        optimizer_step(run)
        run.step += 1
        done = count // train.accumulation_steps
        if done % train.print_freq == 0 or done == steps:
            passes = (done - 1) % train.print_freq + 1
            seconds = time.monotonic() - window_start
            values = means(window, passes * train.accumulation_steps)
            values["images_per_second"] = passes * train.batch_size / seconds
            log_step(run, epoch, done, steps, values)
            bar.set_postfix_str(f"loss {values['loss']:.4f} iou {100 * values['train_mIoU']:.1f}")
            total += window
            window.zero_()
            window_start = time.monotonic()
    return means(total, len(run.train_loader))


def forward_backward(run: Run, batch: TrainingBatch, synchronize: bool) -> Tensor:
    """Add one micro-batch's gradients.

    Args:
        batch: a `utils.dataset.TrainingBatch`.
        synchronize: whether ranks exchange gradients now (the last micro-batch of a step).
    Returns:
        (3,) on the device: loss, IoU, Pr@0.5.
    """
    train, device = run.cfg.TRAIN, run.ranks.device
    images = normalize_images(batch["images"].to(device, non_blocking=True))
    masks = normalize_masks(batch["masks"].to(device, non_blocking=True))
    tokens = batch["tokens"].to(device, non_blocking=True)
    image_index = batch["image_index"]
    if image_index is not None:
        image_index = image_index.to(device, non_blocking=True)
    with nullcontext() if synchronize else no_sync(run.model):
        with torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
            logits = run.model(images, tokens, image_index)
        loss = text_to_pixel_loss(logits, masks, train.target)
        run.scaler.scale(loss / train.accumulation_steps).backward()
    scores = training_scores(logits, resize_target(masks, logits.shape[-2:], train.target))
    return torch.cat([loss.detach()[None], scores])


def optimizer_step(run: Run) -> None:
    """Unscale, clip, step. Clipping acts on the true gradients (official: on scaled ones)."""
    if run.cfg.TRAIN.max_norm > 0:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), run.cfg.TRAIN.max_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)


def means(sums: Tensor, count: int) -> dict[str, float]:
    """Sums over `count` micro-batches -> means over all ranks, by name. Waits for the device."""
    values = mean_over_ranks(sums / count).tolist()
    return dict(zip(TRAINING_METRICS, values, strict=True))


def log_step(run: Run, epoch: int, done: int, steps: int, values: dict[str, float]) -> None:
    """Tell the log and the tracker how the last steps went."""
    rates = {f"lr_{group['name']}": group["lr"] for group in run.optimizer.param_groups}
    run.tracker.log("step", {"epoch": epoch + 1, "step": run.step, **values, **rates})
    left = (steps - done) * run.cfg.TRAIN.batch_size / values["images_per_second"]
    logger.info(
        f"epoch {epoch + 1} step {done}/{steps}: loss {values['loss']:.4f}, "
        f"IoU {100 * values['train_mIoU']:.2f}, {values['images_per_second']:.1f} images/s, "
        f"{duration(left)} left in the epoch"
    )


def validate(run: Run) -> dict[str, float]:
    """Score the validation split on all ranks: mIoU, oIoU and Pr@X."""
    share_buffers(run.model)
    loader = run.val_loader
    scores = evaluate(
        unwrap(run.model),
        loader,
        run.ranks.device,
        run.protocols,
        sentences_per_batch=-(-run.cfg.TRAIN.batch_size_val // run.ranks.world_size),
        progress=progress(loader, len(loader), "validation", run.ranks.is_main),
    )
    return summarize_scores(next(iter(scores.values())))


def save(run: Run, scores: dict[str, float], is_best: bool) -> None:
    """Write everything that `resume` needs, in plain containers."""
    generators = gather_objects(rng_state())
    if not run.ranks.is_main:
        return
    state = {
        "epoch": run.epoch,
        "step": run.step,
        "best_iou": run.best,
        "scores": scores,
        "state_dict": unwrap(run.model).state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "rng": generators,
        "config": to_dict(run.cfg),
    }
    save_checkpoint(state, run.folder, is_best)


def check_resumable(state: dict, source: str) -> None:
    """Refuse a checkpoint that holds weights only (`state` is without them), or an official one.

    Raises:
        UserError: what `resume` needs is not there.
    """
    missing = {"epoch", "step", "best_iou", "optimizer", "scaler", "rng"} - state.keys()
    if missing:
        raise UserError(
            f"TRAIN.resume: {source} lacks {', '.join(sorted(missing))}; to start a new training "
            "from its weights give it as TRAIN.weight"
        )


def resume(run: Run, state: dict, source: str) -> None:
    """Continue where the checkpoint stopped; the weights were loaded when the model was built."""
    run.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty if the precision needed no scaling then
        run.scaler.load_state_dict(state["scaler"])
    run.epoch, run.step, run.best = state["epoch"], state["step"], state["best_iou"]
    if len(state["rng"]) == run.ranks.world_size:
        set_rng_state(state["rng"][run.ranks.rank])
    else:
        logger.warning(
            f"{source} was saved by {len(state['rng'])} ranks, this is {run.ranks.world_size}: "
            "dropout will differ from an uninterrupted run"
        )
    logger.info(f"resumed {source}: epoch {run.epoch}, best mIoU {100 * run.best:.2f}")
