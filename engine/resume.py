"""Stopping and going on: what a checkpoint holds, when it is written, which one to go on from.

A run that was interrupted anywhere and resumed computes what it would have computed otherwise.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from loguru import logger

from engine.build import build_model, restore_model
from engine.checks import check_checkpoint
from engine.run import PICTURES, Run
from model.segmenter import Segmenter
from utils.checkpoint import find_newest, list_checkpoints, read_checkpoint, save_checkpoint
from utils.config import AUTO, Config, save_config, to_dict
from utils.distributed import Ranks, any_rank, gather_objects, is_restart, stop, unwrap
from utils.errors import UserError
from utils.lock import hold
from utils.logger import LOG
from utils.seed import rng_state, set_rng_state
from utils.signals import EXIT_CODE

PREEMPTED = "PREEMPTED"  # in the run's folder: it was asked to stop, and waits to be resumed
PATIENCE = 10.0  # seconds for what a killed run left behind to end

# What a checkpoint has to hold besides weights to be resumed.
NEEDED = {"epoch", "step", "best_iou", "optimizer", "scaler", "rng"}

# Which of a config's values decide what the steps of an epoch consist of.
ORDER_KEYS = (
    *(("TRAIN", name) for name in ("batch_size", "batch_by", "manual_seed")),
    *(("DATA", name) for name in ("train_lmdb", "exclude_lmdb")),
)


def save(run: Run, scores: dict[str, float], is_best: bool) -> bool:
    """Write everything that `resume` needs, in plain containers.

    Args:
        scores: of these weights on the validation split; empty within an epoch.
        is_best: whether they beat all before.
    Returns:
        Whether it could be written; if not, the checkpoint before it is still there.
    """
    by_rank = gather_objects((rng_state(), run.sums.cpu()))
    run.saved_at = time.monotonic()
    if not run.ranks.is_main:
        return True
    state = {
        "epoch": run.epoch,
        "step": run.step,
        "position": run.position,
        "sums": [sums for _, sums in by_rank],
        "faults": run.faults.cpu(),
        "best_iou": run.best,
        "scores": scores,
        "state_dict": unwrap(run.model).state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "rng": [rng for rng, _ in by_rank],
        "config": to_dict(run.cfg),
        "version": run.version,
        "threads": torch.get_num_threads(),
    }
    train = run.cfg.TRAIN
    try:
        save_checkpoint(state, run.folder, is_best, train.keep_checkpoints * bool(train.save_every))
    except OSError as error:
        logger.error(
            f"step {run.step}: no checkpoint could be written to {error.filename}: "
            f"{error.strerror}; the one before is still there"
        )
        return False
    return True


def save_if_due(run: Run) -> None:
    """After a step: write a checkpoint if it is time for one, stop if any rank was asked to."""
    train = run.cfg.TRAIN
    by_clock = run.ranks.is_main and train.save_minutes is not None
    is_late = by_clock and time.monotonic() - run.saved_at >= 60 * train.save_minutes
    is_asked, is_late = any_rank(run.stop.name is not None, is_late)
    if is_asked:
        save_and_stop(run)
    if is_late or (train.save_steps and run.step % train.save_steps == 0):
        save(run, {}, is_best=False)


def stoppable(run: Run, batches: Iterable, count: int) -> Iterator:
    """Go through the validation's batches; when any rank was asked to stop, save and stop.

    Args:
        count: of the rank with the fewest: so often all ranks can ask each other.
    """
    for done, batch in enumerate(batches):
        if done < count and any_rank(run.stop.name is not None)[0]:
            save_and_stop(run)
        yield batch


def save_and_stop(run: Run) -> NoReturn:
    """Save, leave the file `PREEMPTED` and end with its exit code, on all ranks together.

    Raises:
        SystemExit: always, unless
        UserError: there is no room for the checkpoint.
    """
    is_saved = save(run, {}, is_best=False)
    if is_saved and run.ranks.is_main:
        told = f"{run.stop.name or 'a signal to another rank'}: stopped after step {run.step}"
        (run.folder / PREEMPTED).write_text(f"{told}\n")
        logger.warning(f"{told}; TRAIN.resume auto goes on from there")
    # A rank that ends earlier would have torchrun kill the one that saves.
    if not all(gather_objects(is_saved)):
        raise UserError(f"stopped without saving: make room in {run.folder}, then resume")
    raise SystemExit(EXIT_CODE)


@contextmanager
def hold_run_folder(cfg: Config, ranks: Ranks, is_new: bool = False) -> Iterator[None]:
    """Hold the run's folder, so that no second run writes there (`TRAIN.force` lets it).

    The mark of an earlier start that was asked to stop is removed; torchrun restarting ranks that
    were asked to stop ends here.

    Args:
        is_new: the run begins there, since no checkpoint was there when that was chosen.
    Raises:
        UserError: another process holds it, or one that has ended since has saved there.
        SystemExit: as `save_and_stop`.
    """
    folder = cfg.run_folder
    if any_rank(is_restart())[0] and (folder / PREEMPTED).exists():
        raise SystemExit(EXIT_CODE)
    with ExitStack() as stack:
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            if not cfg.TRAIN.force:
                stack.enter_context(_hold(folder))
                if is_new:
                    _refuse_to_overwrite(cfg)
            (folder / PREEMPTED).unlink(missing_ok=True)
        yield


def _hold(folder: Path) -> AbstractContextManager[None]:
    def refuse() -> None:
        raise UserError(
            f"another process is training in {folder}; wait for it, give TRAIN.exp_name another "
            "name, or add TRAIN.force True"
        )

    return hold(folder / LOG, refuse, PATIENCE)


def prepare_folder(cfg: Config, keeps: bool) -> None:
    """Write the config to the run's folder, cleared of what another run has left there.

    Args:
        keeps: its checkpoints and pictures are those of this run.
    """
    folder = cfg.run_folder
    if not keeps:
        old = list_checkpoints(folder)
        if old:
            logger.warning(f"TRAIN.force: {len(old)} checkpoint(s) in {folder} are removed")
        for path in (*old, *(folder / PICTURES).glob("epoch_*.jpg")):
            path.unlink()
    save_config(cfg, folder / "config.yaml")


def choose_checkpoint(cfg: Config, ranks: Ranks, is_dry: bool = False) -> str | None:
    """Return the checkpoint that `TRAIN.resume` asks to continue, or None to begin.

    null begins; auto continues the newest whole checkpoint of the folder, or begins; a path
    continues that checkpoint. Ranks that torchrun restarts continue what their run has saved.

    Args:
        is_dry: who trains in the folder, and what a training would write over, does not matter.
    Raises:
        UserError: all checkpoints are torn; or a run that begins in the folder would write over
            some; or another process holds it.
    """
    source = refusal = None
    # Launchers of several nodes may count restarts differently.
    (is_restarted,) = any_rank(is_restart())
    if ranks.is_main:
        try:
            source = _choose(cfg, not (cfg.TRAIN.force or is_dry), is_restarted)
        except (UserError, OSError) as error:
            refusal = error
    # On all ranks: who waits for a rank that has ended ends with a traceback.
    source, refusal = gather_objects((source, refusal))[0]
    if refusal is not None:
        stop()  # gloo aborts a process that ends after a talk without having left
        raise refusal
    return source


def _choose(cfg: Config, is_careful: bool, is_restarted: bool) -> str | None:
    """Choose on rank 0, careful of other processes and of checkpoints that are there."""
    folder, named = cfg.run_folder, cfg.TRAIN.resume
    if is_careful and (folder / LOG).is_file():
        # Who was asked to stop may be saving; what it leaves counts.
        with _hold(folder):
            pass
    if named == AUTO:
        return _newest(cfg)
    if goes_on(cfg, named) or not list_checkpoints(folder):
        return named
    # torchrun restarts what was refused, too: so only what this very config has saved.
    if is_restarted and (named is not None or cfg.TRAIN.force):
        newest = _newest(cfg)
        if newest and read_checkpoint(newest, "TRAIN.resume").get("config") == to_dict(cfg):
            return newest
    # Who reads it tells that it is not there.
    if is_careful and (named is None or Path(named).is_file()):
        _refuse_to_overwrite(cfg)
    return named


def _newest(cfg: Config) -> str | None:
    """Return the newest whole checkpoint of the run's folder, if there is any."""
    path, torn = find_newest(cfg.run_folder)
    for each in torn:
        logger.warning(f"TRAIN.resume {cfg.TRAIN.resume}: {each} is cut off or damaged, skipped")
    if path is None and torn:
        raise UserError(
            f"TRAIN.resume {cfg.TRAIN.resume}: every checkpoint in {cfg.run_folder} is cut off or "
            "damaged; move them away to train anew"
        )
    return None if path is None else str(path)


def goes_on(cfg: Config, source: str | None) -> bool:
    """Tell whether a run from this checkpoint goes on with the one in its folder."""
    if source is None:
        return False
    path = Path(source)
    return cfg.run_folder.resolve() in (path.parent.resolve(), path.resolve().parent)


def _refuse_to_overwrite(cfg: Config) -> None:
    """Refuse if there are checkpoints that a run which begins there would write over."""
    source = cfg.TRAIN.resume
    kind = "new training" if source in (None, AUTO) else f"training from {source}"
    if old := list_checkpoints(cfg.run_folder):
        raise UserError(
            f"{old[0]} is there, and a {kind} would write over it: set TRAIN.resume auto to "
            "go on with that run, give TRAIN.exp_name another name, or remove its checkpoints by "
            "TRAIN.force True"
        )


def load_start(
    cfg: Config, device: torch.device, source: str | None
) -> tuple[Segmenter, dict | None]:
    """Return the model that a run starts with, and the rest of the checkpoint that it resumes.

    Args:
        source: from `choose_checkpoint`; None: `TRAIN.weight`, or else CLIP's weights.
    Raises:
        UserError: what is named cannot be read, or does not belong to the config.
    """
    if source is None and cfg.TRAIN.weight:
        return restore_model(cfg, device, cfg.TRAIN.weight, "TRAIN.weight")[0], None
    if source is None:
        return build_model(cfg, device), None
    model, state = restore_model(cfg, device, source, "TRAIN.resume")
    if missing := NEEDED - state.keys():
        raise UserError(
            f"TRAIN.resume: {source} lacks {', '.join(sorted(missing))}; to start a new training "
            "from its weights give it as TRAIN.weight"
        )
    check_checkpoint(cfg, state, source)
    return model, state


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict, source: str) -> None:
    """Give the optimiser its moments back; before a run writes anything, since it may not fit.

    Raises:
        UserError: the checkpoint's optimiser had other parameters, or is none.
    """
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"TRAIN.resume: the optimiser in {source} does not fit ({reason}); resume with the "
            "config of its run, or start from its weights with TRAIN.weight"
        ) from None


def records_until(state: dict) -> Callable[[dict], bool]:
    """Which records of `metrics.jsonl` were written before the checkpoint."""
    return lambda record: record.get(record["kind"], 0) <= state[record["kind"]]


def resume(run: Run, state: dict, source: str) -> None:
    """Continue where the checkpoint stopped; model and optimiser have been restored before."""
    if state["scaler"]:  # empty if the precision needed no scaling then
        run.scaler.load_state_dict(state["scaler"])
    run.epoch, run.step, run.best = state["epoch"], state["step"], state["best_iou"]
    run.position = state.get("position", 0)
    if "sums" in state:
        sums, ranks = state["sums"], run.ranks
        # With another number of ranks their mean, which gives the same means over all.
        is_own = len(sums) == ranks.world_size
        run.sums.copy_(sums[ranks.rank] if is_own else torch.stack(sums).mean(0))
    if "faults" in state:
        run.faults.copy_(state["faults"])
    if len(state["rng"]) == run.ranks.world_size:
        set_rng_state(state["rng"][run.ranks.rank])
    else:
        logger.warning(
            f"{source} was saved by {len(state['rng'])} ranks, this is {run.ranks.world_size}: "
            "dropout will differ from an uninterrupted run"
        )
    _tell_differences(run, state, source)
    within = f" and {run.position} steps" if run.position else ""
    meta = run.val_loader.dataset.reader.meta
    best = f"best mIoU on {meta['dataset']} {meta['split']} {100 * run.best:.2f}"
    scored = best if run.best >= 0 else "not validated yet"
    logger.info(f"resumed {source}: epoch {run.epoch}{within}, {scored}")


def _tell_differences(run: Run, state: dict, source: str) -> None:
    """Warn of what makes a resumed run another one than it would have been."""
    threads, version = state.get("threads"), state.get("version")
    if threads not in (None, torch.get_num_threads()):
        logger.warning(
            f"{source} was saved by a run with {threads} threads, this has "
            f"{torch.get_num_threads()}: last bits will differ (OMP_NUM_THREADS sets them)"
        )
    if version != run.version:
        logger.info(f"{source} was saved by version {version} of the code, this is {run.version}")

    def order(config: dict[str, Any]) -> list:
        return [config.get(section, {}).get(name) for section, name in ORDER_KEYS]

    if run.position and order(state["config"]) != order(to_dict(run.cfg)):
        logger.warning(
            f"{source} was saved within an epoch of other batches: in this epoch some refs come "
            "twice or not at all"
        )
