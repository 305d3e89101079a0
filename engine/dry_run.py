"""`train.py --dry-run`: one optimiser step and one validation batch, and nothing is written."""

import time
from itertools import islice

import torch
from loguru import logger

from engine.pace import memory_in_use
from engine.run import Run
from engine.trainer import means, take_step, validate
from utils.distributed import gather_objects
from utils.metrics import main_metric, percent


def dry_run(run: Run) -> None:
    """Take the next step of `run`, score one batch, and log both; all ranks call it."""
    start = time.monotonic()
    if run.position >= run.length:  # it was stopped in the validation
        run.epoch, run.position = run.epoch + 1, 0
    run.model.train()
    run.train_loader.batch_sampler.set_epoch(run.epoch, run.position)
    sums = torch.zeros_like(run.sums[0])
    take_step(run, list(islice(run.train_loader, run.cfg.TRAIN.accumulation_steps)), sums)
    loss, seconds = means(sums)["loss"], time.monotonic() - start
    skipped = "; the step was left out: its gradients are not finite" if run.faults[0] else ""
    logger.info(
        f"one step of {run.cfg.TRAIN.batch_size} refs in {seconds:.1f} s: "
        f"loss {loss:.4f}{skipped}; {_memory(run)}"
    )
    start, scores = time.monotonic(), validate(run, batches=1)
    seconds, name = time.monotonic() - start, main_metric(scores)
    logger.info(
        f"one validation batch, {scores['sentences']} sentences, in {seconds:.1f} s: "
        f"{name} {percent(scores[name])}; {_memory(run)}"
    )
    logger.info(f"dry run: nothing was written to {run.folder}")


def _memory(run: Run) -> str:
    """Describe the memory of the rank that took most: of its GPU, or of its process."""
    return f"peak memory {max(gather_objects(memory_in_use(run.ranks.device))):.2f} GiB"
