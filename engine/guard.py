"""Keep numbers that are not finite out of the weights, the optimiser and BatchNorm's statistics.

Nothing waits for the device on ordinary steps: what happened stays there until the next line in
the log, which tells of the steps that were left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from itertools import islice

import torch
from loguru import logger
from torch import Tensor, nn

from engine.run import Run
from utils.distributed import gather_objects
from utils.errors import UserError

PERSISTENT = 20  # steps in a row; fp16's first scale needs at most 16 to find its size
NAMED_REFS = 8


def optimizer_step(run: Run) -> None:
    """Unscale, clip and step, unless a gradient is not finite; count the steps left out.

    Clipping acts on the true gradients (the release clips scaled ones).
    """
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    if run.cfg.TRAIN.max_norm > 0:
        run.scaler.unscale_(run.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, run.cfg.TRAIN.max_norm)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
    is_bad = ~torch.isfinite(norm)
    count, streak, first = run.faults
    count += is_bad
    streak.add_(1).mul_(is_bad)
    first += (first == 0) * is_bad * (run.position + 1)
    if run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:
        _step_unless(run.optimizer, is_bad)
    run.optimizer.zero_grad(set_to_none=True)


def _step_unless(optimizer: torch.optim.Optimizer, is_bad: Tensor) -> None:
    """Step unless `is_bad`; a fused optimiser reads that on the device, others wait for it."""
    if optimizer.defaults.get("fused"):  # the attributes by which GradScaler tells it
        optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not is_bad:
        optimizer.step()


@contextmanager
def finite_statistics(model: nn.Module) -> Iterator[None]:
    """Undo what a pass does to BatchNorm's running statistics if they would not be finite after it.

    They would stay so, since each pass changes them by a part. Backward belongs inside: recomputed
    passes write them too.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var)]
    before = torch.cat(statistics)
    yield
    after = torch.cat(statistics)
    kept = torch.where(after.isfinite().all(), after, before)
    torch._foreach_copy_(statistics, kept.split([len(s) for s in statistics]))


def log_skipped_steps(run: Run) -> int:
    """Tell of the steps that were left out since the last call, and return their number.

    Waits for the device.

    Raises:
        UserError: the last `PERSISTENT` steps were all left out.
    """
    count, streak, first = run.faults.tolist()
    run.faults[0], run.faults[2] = 0, 0
    if streak >= PERSISTENT:
        refs = _name_refs(run, run.position)
        raise UserError(
            f"gradients were not finite in {streak} steps in a row, and nothing was learnt since "
            f"step {run.step - streak + 1}; the last is step {run.step}: {refs}. Try "
            "TRAIN.precision fp32, a lower TRAIN.base_lr, or TRAIN.max_norm"
        )
    if count and run.scaler.is_enabled():
        logger.info(
            f"{count} steps left out since the last line: fp16 overflowed; the loss is scaled by "
            f"{run.scaler.get_scale():g} now"
        )
    elif count:
        logger.warning(
            f"{count} steps left out since the last line: gradients were not finite; the first is "
            f"step {run.step - run.position + first}: {_name_refs(run, first)}"
        )
    return count


def _name_refs(run: Run, position: int) -> str:
    """Name the refs of a step of this epoch; all ranks call it."""
    sampler = copy(run.train_loader.batch_sampler)
    sampler.set_epoch(run.epoch, position - 1)
    passes = islice(sampler, run.cfg.TRAIN.accumulation_steps)
    own = [run.train_loader.dataset.describe(visit) for visits in passes for visit in visits]
    refs = [ref for part in gather_objects(own) for ref in part]
    names = [f"ref {ref_id} “{sentence}”" for ref_id, sentence in refs[:NAMED_REFS]]
    more = len(refs) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
