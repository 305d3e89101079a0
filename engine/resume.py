"""Stopping and going on: what a checkpoint holds, when it is written, which one to go on from.

A run that was interrupted anywhere and resumed computes what it would have computed otherwise.
"""

import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
from loguru import logger
from torch.utils.data import DataLoader

from engine.build import build_model, restore_model
from engine.checks import check_checkpoint
from engine.run import PICTURES, Run
from model.segmenter import Segmenter
from utils.checkpoint import BEST, find_newest, list_checkpoints, read_checkpoint, save_checkpoint
from utils.config import AUTO, Config, save_config
from utils.distributed import Ranks, any_rank, gather_objects, is_restart, stop, unwrap
from utils.errors import UserError, loader_loss
from utils.lock import hold
from utils.logger import LOG
from utils.records import RecordReader
from utils.seed import rng_state, set_rng_state
from utils.signals import EXIT_CODE, raise_losses_when_fetching

# Without these a checkpoint is weights alone (the release's has an optimiser too), or older.
NEEDED = {"rng", "optimizer", "progress", "faults", "records", "best_on"}
PREEMPTED = "PREEMPTED"  # in the run's folder: it was asked to stop, and waits to be resumed
ASK_EVERY = 0.25  # seconds between two exchanges of ranks, about
MOST_APART = 16  # steps: so a signal is soon seen where steps become slower
PATIENCE = 10.0  # seconds for what a killed run left behind to end


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
    rngs, sums = zip(*by_rank, strict=True)
    state = {
        "epoch": run.epoch,
        "step": run.step,
        "position": run.position,
        "length": run.length,
        "progress": run.progress,
        "sums": list(sums),
        "faults": run.faults.cpu(),
        "best_iou": run.best,
        "best_on": measured_on(run),
        "records": digests(run),
        "no_target": any(
            "no_target" in reader.meta for reader, _ in run.train_loader.dataset.records.parts
        ),
        "scores": scores,
        "state_dict": unwrap(run.model).state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "rng": list(rngs),
        "config": run.cfg.model_dump(),
        "version": run.version,
        "threads": torch.get_num_threads(),
    }
    train = run.cfg.TRAIN
    try:
        save_checkpoint(state, run.folder, is_best, train.keep_checkpoints * bool(train.save_every))
    except OSError as error:
        logger.error(
            f"step {run.step}: {error.filename} could not be written: {error.strerror}; the "
            "checkpoint before is still there"
        )
        return False
    return True


def stoppable(
    run: Run, loader: DataLoader, batches: Iterable, size: int = 1, count: float = math.inf
) -> Iterator[list]:
    """Yield so many batches at a time; between them save what is due, and stop if any rank has to.

    A rank that loses its loader's processes reads here, until ranks ask each other and save.

    Args:
        batches: goes through `loader`.
        count: groups of the rank with the fewest: so many go by while all ranks ask each other.
    """
    source, begun = iter(batches), run.step
    done = asked = ask_at = 0
    since = time.monotonic()
    while True:
        try:
            group = list(islice(source, size))
        except (RuntimeError, OSError, EOFError) as error:
            run.stop.loss = loader_loss(error)
            if run.stop.loss is None:
                raise
            rest = islice(loader.batch_sampler, size * done, None)
            source = (loader.collate_fn([loader.dataset[i] for i in batch]) for batch in rest)
            group = list(islice(source, size))
        finally:
            raise_losses_when_fetching()
        asks = not group or done == ask_at < count
        save_if_due(run, has_stepped=run.step > begun, asks=asks)
        if not group:
            return
        if asks:
            ask_at = done + steps_apart(time.monotonic() - since, done - asked)
            asked, since = done, time.monotonic()
        yield group
        done += 1


def steps_apart(seconds: float, count: int) -> int:
    """Return after how many steps ranks ask each other again; all call it, and get the same.

    Args:
        seconds: what the last `count` steps took on this rank.
    """
    if len(slowest := gather_objects(seconds / max(count, 1))) == 1:
        return 1  # a single process asks nobody
    return min(max(int(ASK_EVERY / max(*slowest, 1e-9)), 1), MOST_APART if count else 1)


def save_if_due(run: Run, has_stepped: bool = True, asks: bool = True) -> None:
    """Write a checkpoint if it is time for one after a step; stop if any rank has to.

    Args:
        asks: whether ranks tell each other now of signals and of the clock.
    """
    number, _, unit = (run.cfg.TRAIN.save_every or "0 never").partition(" ")
    interval, is_late = int(number), False
    if asks:
        by_clock = run.ranks.is_main and unit == "minutes"
        is_late = by_clock and time.monotonic() - run.saved_at >= 60 * interval
        is_asked, is_late = any_rank(bool(run.stop.name or run.stop.loss), is_late)
        if is_asked:
            save_and_stop(run)
    if has_stepped and (is_late or (unit in ("", "steps") and run.step % interval == 0)):
        save(run, {}, is_best=False)


def save_and_stop(run: Run) -> NoReturn:
    """Save, leave the file `PREEMPTED` and end with its exit code, on all ranks together.

    Raises:
        SystemExit: always, but for
        UserError: a loader process was lost, or the checkpoint could not be written.
    """
    is_saved = save(run, {}, is_best=False)
    names, losses = zip(*gather_objects((run.stop.name, run.stop.loss)), strict=True)
    # A signal to the whole group ends the loaders' processes as well.
    if (loss := next(filter(None, losses), None)) and any(names):
        logger.warning(f"{loss}; or by the signal")
        loss = None
    if is_saved and not loss and run.ranks.is_main:
        told = f"{run.stop.name or 'a signal to another rank'}: stopped after step {run.step}"
        (run.folder / PREEMPTED).write_text(f"{told}\n")
        logger.warning(f"{told}; TRAIN.resume auto goes on from there")
    # A rank that ends earlier would have torchrun kill the one that saves.
    if not all(gather_objects(is_saved)):
        raise UserError(f"stopped without saving: make room in {run.folder}, then resume")
    if loss:
        raise UserError(f"{loss}; step {run.step} is saved: TRAIN.resume auto goes on from there")
    raise SystemExit(EXIT_CODE)


@contextmanager
def hold_run_folder(cfg: Config, ranks: Ranks, is_dry: bool = False) -> Iterator[str | None]:
    """Hold the run's folder against other runs; give the checkpoint to go on from, None to begin.

    Args:
        is_dry: nothing will be written, so neither other runs nor their checkpoints matter.
    Raises:
        UserError: another process holds it, or a run that begins would write over checkpoints
            (`TRAIN.force` lets both pass); or all checkpoints are torn.
        SystemExit: torchrun restarts ranks that were asked to stop.
    """
    (is_restarted,) = any_rank(is_restart())  # launchers of several nodes may count differently
    source = ending = None
    with ExitStack() as stack:
        if ranks.is_main:
            try:
                if not (cfg.TRAIN.force or is_dry):
                    stack.enter_context(_hold(cfg.run_folder))
                source = _choose(cfg, is_restarted, is_dry)
            except (UserError, OSError, SystemExit) as error:
                ending = error
        # On all ranks: who waits for a rank that has ended ends with a traceback.
        source, ending = gather_objects((source, ending))[0]
        if ending is not None:
            stop()  # gloo aborts a process that ends after a talk without having left
            raise ending
        yield source


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Hold the folder, made if it is missing; a run that fails before its first line leaves none.

    Who was asked to stop may still be saving: what it leaves counts, so it is waited for.
    """

    def refuse() -> None:
        raise UserError(
            f"another process is training in {folder}; wait for it, give TRAIN.exp_name another "
            "name, or add TRAIN.force True"
        )

    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    with hold(log, refuse, PATIENCE):
        try:
            yield
        finally:
            with suppress(OSError):  # other files are there
                if log.stat().st_size == 0:
                    log.unlink()
                    os.removedirs(folder)


def _choose(cfg: Config, is_restarted: bool, is_dry: bool) -> str | None:
    """Return the checkpoint that `TRAIN.resume` names, and None to begin."""
    folder, named = cfg.run_folder, cfg.TRAIN.resume
    if is_restarted and (folder / PREEMPTED).exists():
        raise SystemExit(EXIT_CODE)
    there = list_checkpoints(folder)
    if named == AUTO or (is_restarted and there):
        newest = find_newest(folder)
        own = cfg.model_dump()
        # What was refused is restarted, too: so only what this very config has saved.
        if named == AUTO or read_checkpoint(newest, "TRAIN.resume").get("config") == own:
            return None if newest is None else str(newest)
    if there and not (is_own_checkpoint(cfg, named) or cfg.TRAIN.force or is_dry):
        kind = f"training from {named}" if named else "new training"
        raise UserError(
            f"{there[0]} is there, and a {kind} would write over it: set TRAIN.resume auto to go "
            "on with that run, give TRAIN.exp_name another name, or remove its checkpoints by "
            "TRAIN.force True"
        )
    return named


def is_own_checkpoint(cfg: Config, source: str | None) -> bool:
    """Tell whether a checkpoint, if one is given, lies in the run's own folder."""
    path = Path(source or "/")
    return cfg.run_folder.resolve() in (path.parent.resolve(), path.resolve().parent)


def prepare_folder(cfg: Config, keeps: bool) -> None:
    """Write the config to the run's folder, cleared of what another run has left there.

    Args:
        keeps: its checkpoints and pictures are those of this run.
    """
    folder = cfg.run_folder
    if not keeps:
        if old := list_checkpoints(folder):
            logger.warning(f"TRAIN.force: {len(old)} checkpoint(s) in {folder} are removed")
        for path in (*old, *(folder / PICTURES).glob("epoch_*.jpg")):
            path.unlink()
    (folder / PREEMPTED).unlink(missing_ok=True)
    save_config(cfg, folder / "config.yaml")


def load_start(
    cfg: Config, device: torch.device, source: str | None
) -> tuple[Segmenter, dict | None]:
    """Return the model that a run starts with, and the rest of the checkpoint that it resumes.

    Args:
        source: from `hold_run_folder`; None: `TRAIN.weight`, or else CLIP's weights.
    Raises:
        UserError: what is named cannot be read, or does not belong to the config.
    """
    if source is None and cfg.TRAIN.weight:
        return restore_model(cfg, device, cfg.TRAIN.weight, "TRAIN.weight")[0], None
    if source is None:
        return build_model(cfg, device), None
    model, state = restore_model(cfg, device, source, "TRAIN.resume")
    if not state.keys() >= NEEDED:
        raise UserError(
            f"TRAIN.resume: {source} holds less than resuming needs; to start a new training from "
            "its weights give it as TRAIN.weight"
        )
    check_checkpoint(cfg, state, source, is_training=True)
    return model, state


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict, source: str) -> None:
    """Give the optimiser its moments back; rates, decay and all other settings stay the config's.

    Before a run writes anything, since it may not fit.

    Raises:
        UserError: the checkpoint's optimiser had other parameters, or was of another kind.
    """
    saved = state["optimizer"]
    try:
        pairs = list(zip(optimizer.param_groups, saved["param_groups"], strict=True))
        # Torch takes settings and moments of any kind for any other's.
        for own, group in pairs:
            kinds = [(g.keys(), g.get("decoupled_weight_decay")) for g in (own, group)]
            if kinds[0] != kinds[1]:
                raise ValueError("it is of another kind")
        groups = [own | {"params": group["params"]} for own, group in pairs]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        for parameter, moments in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if (moment := moments.get(name)) is not None and moment.shape != parameter.shape:
                    raise ValueError("its moments have other shapes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"TRAIN.resume: the optimiser in {source} does not fit ({str(error).splitlines()[0]}); "
            "resume with the config of its run, or start from its weights with TRAIN.weight"
        ) from None


def measured_on(run: Run) -> dict[str, object]:
    """Return what a score of the validation depends on, but for the model."""
    dataset, train = run.val_loader.dataset, run.cfg.TRAIN
    meta = dataset.reader.meta
    ((name, protocol),) = run.protocols.items()
    rule = {"no_target_pixels": protocol.no_target_pixels} if "no_target" in meta else {}
    return rule | {
        "data set": meta["dataset"],
        "split": meta["split"],
        "protocol": name,
        "threshold": protocol.threshold,
        "val_sentences": dataset.sentences,
        "input_size": train.input_size,
        "word_len": train.word_len,
        "records": dataset.reader.digest()[:12],
    }


def digests(run: Run) -> dict[str, str]:
    """Return the digest of each file that is trained on, or left out of that, by its path."""
    readers = [reader for reader, _ in run.train_loader.dataset.records.parts]
    if len(readers) > 1:
        readers += map(RecordReader, run.cfg.DATA.exclude_lmdb)
    return {str(reader.path): reader.digest() for reader in readers}


def resume(run: Run, state: dict, source: str) -> None:
    """Continue where the checkpoint stopped; model and optimiser have been restored before.

    What has changed since is logged: the run may differ from an uninterrupted one.
    """
    position, length, rngs, sums = (state[key] for key in ("position", "length", "rng", "sums"))
    run.epoch, run.step, run.position = state["epoch"], state["step"], position
    run.reached = state["progress"]
    if length == run.length:
        run.faults.copy_(state["faults"])
    elif position:
        run.position = position * run.length // length
        logger.warning(
            f"epoch {run.epoch + 1} goes on at step {run.position} of {run.length}, where {source} "
            f"had taken {position} of {length}: some refs may come twice"
        )
    if state["scaler"]:  # empty if the precision needed no scaling then
        run.scaler.load_state_dict(state["scaler"])
    if len(rngs) == run.ranks.world_size:
        set_rng_state(rngs[run.ranks.rank])
        run.sums.copy_(sums[run.ranks.rank])
    else:
        run.sums.copy_(torch.stack(sums).sum(0) / run.ranks.world_size)  # gives the same means
    _resume_best(run, state, source)
    for path, digest in digests(run).items():
        if digest not in state["records"].values():  # files may have been moved
            logger.warning(f"{path} holds other records than the run had when {source} was saved")
    was = {"ranks": len(rngs), "threads": state["threads"], "code": state["version"]}
    now = {"ranks": run.ranks.world_size, "threads": torch.get_num_threads(), "code": run.version}
    for section, values in run.cfg.model_dump().items():
        for key, value in values.items():
            was[f"{section}.{key}"] = state["config"][section].get(key)
            now[f"{section}.{key}"] = value
    for name in now:
        if was[name] != now[name] and name not in ("TRAIN.resume", "TRAIN.force"):
            logger.warning(f"{name} was {was[name]} when {source} was saved, now {now[name]}")


def _resume_best(run: Run, state: dict, source: str) -> None:
    """Take over the best score, unless it was measured otherwise or its model is not there."""
    now, was = measured_on(run), state["best_on"]
    faults = [f"{key} {was.get(key)}, now {now[key]}" for key in now if was.get(key) != now[key]]
    if not (run.folder / BEST).exists():
        faults.append(f"{run.folder / BEST} is not there")
    if not faults:
        run.best = state["best_iou"]
    elif state["best_iou"] >= 0:
        logger.warning(
            f"best score {100 * state['best_iou']:.2f} of {source} does not count, a new best "
            f"begins: {'; '.join(faults)}"
        )
