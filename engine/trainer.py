"""The training loop: `fit` goes through epochs, `train_one_epoch` through steps."""

import time
from contextlib import nullcontext
from itertools import chain

import torch
from loguru import logger
from torch import Tensor

from engine.evaluator import HALF, describe_scores, evaluate, summarize_scores
from engine.guard import finite_statistics, log_skipped_steps, optimizer_step
from engine.loaders import to_device
from engine.optim import set_rates
from engine.pace import Pace
from engine.pictures import show_sentences, watched_sentences
from engine.resume import save, stoppable
from engine.run import Run
from model.loss import resize_target, text_to_pixel_loss
from utils.dataset import TrainingBatch
from utils.distributed import gather_objects, no_sync, share_buffers, unwrap
from utils.errors import UserError
from utils.logger import duration, progress
from utils.metrics import main_metric, training_scores
from utils.signals import listen
from utils.transforms import normalize_images, normalize_masks

# As `training_scores` measures them, on the small map; validation has the plain names.
TRAINING_METRICS = ("loss", "train_mIoU", "train_Pr@0.5")


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that the forward pass computes in; "auto" is fp16 on CUDA, fp32 on the CPU."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return HALF.get(name, torch.float32)


def build_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling, which only fp16 needs; disabled it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def fit(run: Run) -> None:
    """Train from where `run` is to the last epoch; validate every `TRAIN.val_freq` epochs.

    After each validation a checkpoint is written. A signal that asks to stop is obeyed after the
    step, or within the validation.

    Raises:
        SystemExit: it was asked to stop, and has saved.
        UserError: the last checkpoint could not be written.
    """
    epochs, val_freq = run.cfg.TRAIN.epochs, run.cfg.TRAIN.val_freq
    first, start, is_saved = run.epoch, time.monotonic(), True
    if first >= epochs:
        logger.info(f"all {epochs} epochs are done: raise TRAIN.epochs to train on")
    with listen(run.stop):
        while run.epoch < epochs:
            losses = train_one_epoch(run)
            line = f"epoch {run.epoch + 1}/{epochs}: loss {losses['loss']:.4f}"
            is_validated = (run.epoch + 1) % val_freq == 0 or run.epoch + 1 == epochs
            scores = validate(run) if is_validated else {}
            run.epoch, run.position = run.epoch + 1, 0
            run.tracker.log("epoch", {"epoch": run.epoch, "step": run.step, **losses, **scores})
            if is_validated:
                score = scores[main_metric(scores)]
                is_best = score > run.best
                run.best = max(run.best, score)
                is_saved = save(run, scores, is_best)
                left = (time.monotonic() - start) / (run.epoch - first) * (epochs - run.epoch)
                line += f"; {describe_scores(scores, run.val_loader.dataset, run.protocols)}"
                line += f"{' (best)' if is_best else ''}; {duration(left)} left"
            if is_validated or run.told == run.step or run.length >= run.cfg.TRAIN.print_freq:
                logger.info(line)
    if not is_saved:
        raise UserError(f"the last checkpoint is missing: make room in {run.folder}, then resume")


def train_one_epoch(run: Run) -> dict[str, float]:
    """Go through what is left of an epoch: `run.epoch` after `run.position` steps.

    The host waits for the device only when it logs: until then sums stay on the device.

    Returns:
        Means over the epoch and all ranks, by the names of `TRAINING_METRICS`.
    """
    train = run.cfg.TRAIN
    run.model.train()
    if run.position == 0:
        run.sums.zero_()
    total, window = run.sums
    done = run.position * train.accumulation_steps
    loader, pace = run.train_loader, Pace(run.ranks.device)
    loader.batch_sampler.set_epoch(run.epoch, run.position)
    watched = pace.watch(loader)
    bar = progress(watched, len(loader), f"epoch {run.epoch + 1}", run.ranks.is_main, done)
    for micro_batches in stoppable(run, loader, bar, train.accumulation_steps):
        take_step(run, micro_batches, window)
        run.step += 1
        run.position += 1
        if run.position % train.print_freq == 0 or run.position == run.length:
            values = means(window)
            values["skipped_steps"] = log_skipped_steps(run)
            values |= pace.lap(train.batch_size // train.accumulation_steps)
            log_step(run, values)
            bar.set_postfix_str(describe_step(values))
            total += window
            window.zero_()
    return means(total + window)


def take_step(run: Run, micro_batches: list[TrainingBatch], sums: Tensor) -> None:
    """Take an optimiser step, and add to `sums` what `forward_backward` returns, for each ref."""
    set_rates(run.optimizer, run.cfg, run.progress, run.step)
    for count, batch in enumerate(micro_batches, start=1):
        values = forward_backward(run, batch, synchronize=count == len(micro_batches))
        sums += len(batch["masks"]) * values  # refs, as batches are of other sizes after resuming
    optimizer_step(run)


def forward_backward(run: Run, batch: TrainingBatch, synchronize: bool) -> Tensor:
    """Add one micro-batch's gradients.

    Args:
        synchronize: whether ranks exchange gradients now (the last micro-batch of a step).
    Returns:
        (4,) on the device: loss, IoU, Pr@0.5 and 1, which counts it.
    """
    train, device = run.cfg.TRAIN, run.ranks.device
    batch = to_device(batch, device)
    images, masks = normalize_images(batch["images"]), normalize_masks(batch["masks"])
    with finite_statistics(run.model), nullcontext() if synchronize else no_sync(run.model):
        with torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
            logits = run.model(images, batch["tokens"], batch["image_index"])
        truth = resize_target(masks, logits.shape[-2:], train.target)
        loss = text_to_pixel_loss(logits, masks, train.target)
        run.scaler.scale(loss / train.accumulation_steps).backward()
    scores = training_scores(logits, truth)
    return torch.cat([loss.detach()[None], scores, scores.new_ones(1)])


def means(sums: Tensor) -> dict[str, float]:
    """Turn sums and their count into means over all ranks. Waits for the device."""
    by_rank = torch.tensor(gather_objects((sums[:-1] / sums[-1]).tolist()))
    return dict(zip(TRAINING_METRICS, by_rank.mean(0).tolist(), strict=True))


def log_step(run: Run, values: dict[str, float]) -> None:
    """Tell the tracker how the last steps went, and the log if enough came since its last line."""
    rates = {f"lr_{group['name']}": group["lr"] for group in run.optimizer.param_groups}
    run.tracker.log("step", {"epoch": run.epoch + 1, "step": run.step, **values, **rates})
    if run.told is not None and run.step - run.told < run.cfg.TRAIN.print_freq:
        return
    run.told, speed = run.step, values["refs_per_second"]
    left = (run.length - run.position) * run.cfg.TRAIN.batch_size / speed
    logger.info(
        f"epoch {run.epoch + 1} step {run.position}/{run.length}: {describe_step(values)}, "
        f"{speed:.1f} refs/s, {duration(left)} left in the epoch"
    )


def describe_step(values: dict[str, float]) -> str:
    """The numbers of a line in the log that the bar shows as well."""
    return (
        f"loss {values['loss']:.4f}, IoU {100 * values['train_mIoU']:.2f}, "
        f"{100 * values['data_wait_share']:.0f} % waiting for data, {values['memory_gib']:.2f} GiB"
    )


def validate(run: Run, batches: int | None = None) -> dict[str, float]:
    """Score the validation split on all ranks, and show the sentences that are watched.

    Args:
        batches: score each rank's first so many alone, and show nothing.
    Returns:
        What `summarize_scores` says, and the number of sentences.
    """
    share_buffers(run.model)
    loader = run.val_loader
    shown = 0 if batches else run.cfg.TRAIN.val_pictures
    watched = watched_sentences(loader.dataset, shown)
    bar = progress(loader, len(loader), "validation", run.ranks.is_main)
    fewest = min(gather_objects(len(loader)))
    scores = evaluate(
        unwrap(run.model),
        loader,
        run.ranks.device,
        run.protocols,
        sentences_per_batch=-(-run.cfg.TRAIN.batch_size_val // run.ranks.world_size),
        in_full=watched,
        progress=bar if batches else chain.from_iterable(stoppable(run, loader, bar, 1, fewest)),
        batches=batches,
    )
    lines = next(iter(scores.values()))
    if run.ranks.is_main:
        show_sentences(run, [line for line in lines if line.key in watched])
    return summarize_scores(lines) | {"sentences": len(lines)}
