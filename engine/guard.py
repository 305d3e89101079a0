"""Numbers that go wrong: a step whose gradients are not finite is left out, in any precision.

So is what a batch tells BatchNorm's running statistics, if they would not be finite after it.

Nothing waits for the device on ordinary steps: what happened stays there until the next line in
the log. One such step is told, with its refs; many in a row end the run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from itertools import islice

import torch
from loguru import logger
from torch import Tensor, nn

from engine.run import Run
from utils.checkpoint import write_state
from utils.config import to_dict
from utils.distributed import gather_objects, unwrap
from utils.errors import UserError
from utils.files import atomic_path

PERSISTENT = 20  # steps in a row; fp16's first scale needs at most 16 to find its size
REPRO = "not_finite.pth"  # in the run's folder


def apply_step(run: Run) -> None:
    """Unscale, clip and step, unless a gradient is not finite; note which.

    Clipping acts on the true gradients (official: on scaled ones).
    """
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    if run.cfg.TRAIN.max_norm > 0:
        run.scaler.unscale_(run.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, run.cfg.TRAIN.max_norm)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
    is_bad = ~torch.isfinite(norm)
    _note(run.faults, is_bad, run.position + 1)
    if run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:
        _step_unless(run.optimizer, is_bad)


@contextmanager
def finite_statistics(model: nn.Module) -> Iterator[None]:
    """A pass after which BatchNorm's running statistics would not be finite leaves them all alone.

    They would stay so, since each pass changes them by a part. Backward belongs inside:
    recomputed passes write them too.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var)]
    before = torch.cat(statistics)
    yield
    after = torch.cat(statistics)
    kept = torch.where(after.isfinite().all(), after, before)
    for values, part in zip(statistics, kept.split([len(s) for s in statistics]), strict=True):
        values.copy_(part)


def _step_unless(optimizer: torch.optim.Optimizer, is_bad: Tensor) -> None:
    """As loss scaling does it: the fused optimiser reads the flag where it is, on the device."""
    if not optimizer.defaults.get("fused"):
        raise TypeError(f"{type(optimizer).__name__} cannot leave out a step: make it fused")
    optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def _note(faults: Tensor, is_bad: Tensor, position: int) -> None:
    """Count on the device; `faults` is what `Run` says."""
    count, streak, first = faults
    count += is_bad
    streak.add_(1).mul_(is_bad)
    first += (first == 0) * is_bad * position


def log_skipped_steps(run: Run) -> int:
    """Tell of the steps that were left out since the last look. Waits for the device.

    Returns:
        Their number.
    Raises:
        UserError: the last `PERSISTENT` steps were all left out (rank 0; others just end).
    """
    count, streak, first = run.faults.tolist()
    run.faults[0], run.faults[2] = 0, 0
    if streak >= PERSISTENT:
        _give_up(run, streak, max(run.position - streak + 1, first))
    if count and run.scaler.is_enabled():
        logger.info(
            f"{count} steps left out since the last line: fp16 overflowed; the loss is scaled by "
            f"{run.scaler.get_scale():g} now"
        )
    elif count:
        refs = _tell([ref for part in gather_objects(_refs(run, first)) for ref in part])
        logger.warning(
            f"{count} steps left out since the last line: gradients were not finite; the first is "
            f"step {_step(run, first)}: {refs}"
        )
    return count


def _give_up(run: Run, streak: int, position: int) -> None:
    """Save what reproduces it: these batches on these weights, which have not changed since."""
    samples = [run.train_loader.dataset.__getitems__(visits) for visits in _visits(run, position)]
    batches = [run.train_loader.collate_fn(batch) for batch in samples]
    parts = gather_objects((_refs(run, position), batches))
    refs = [ref for part, _ in parts for ref in part]
    path, step = run.folder / REPRO, _step(run, position)
    kept = f"{path} has that batch with the weights"
    if run.ranks.is_main:
        content = {
            "epoch": run.epoch,
            "step": step,
            "refs": refs,
            "batches": [batches for _, batches in parts],
            "state_dict": unwrap(run.model).state_dict(),
            "config": to_dict(run.cfg),
        }
        try:
            with atomic_path(path) as partial:
                write_state(content, partial)
        except OSError as error:
            kept = f"{path} could not be written ({error.strerror})"
    since = run.step - streak + 1  # perhaps in an epoch before this one
    at = "" if since == step else f"; step {step}"
    gather_objects(None)  # who ends earlier would have torchrun kill the one that writes
    if not run.ranks.is_main:
        raise SystemExit(1)
    raise UserError(
        f"gradients were not finite in {streak} steps in a row, and nothing was learnt since step "
        f"{since}{at}: {_tell(refs)}; {kept}. Try TRAIN.precision fp32, "
        "a lower TRAIN.base_lr, or TRAIN.max_norm"
    )


def _step(run: Run, position: int) -> int:
    """Of the whole run."""
    return run.step - run.position + position


def _visits(run: Run, position: int) -> list[list[tuple[int, int]]]:
    """This rank's micro-batches of a step of this epoch."""
    sampler = copy(run.train_loader.batch_sampler)
    sampler.set_epoch(run.epoch, position - 1)
    return list(islice(sampler, run.cfg.TRAIN.accumulation_steps))


def _refs(run: Run, position: int) -> list[tuple[int, str]]:
    """ref_id and sentence of this rank's share of a step of this epoch."""
    dataset = run.train_loader.dataset
    return [dataset.describe(visit) for visits in _visits(run, position) for visit in visits]


def _tell(refs: list[tuple[int, str]], most: int = 8) -> str:
    names = [f"ref {ref_id} “{sentence}”" for ref_id, sentence in refs[:most]]
    more = f" and {len(refs) - most} more" if len(refs) > most else ""
    return ", ".join(names) + more
