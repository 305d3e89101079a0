"""Samplers and loaders. The order of samples depends on seed and epoch alone, never on workers."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from loguru import logger
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from engine.checks import check_records
from utils.cache import open_cache
from utils.config import Config
from utils.dataset import EvaluationDataset, TrainingDataset, collate_images, collate_refs
from utils.distributed import Ranks
from utils.errors import SHM_REMEDY, UserError
from utils.machine import available_cores
from utils.records import JoinedReader, RecordReader, group_positions, on_images_of
from utils.signals import leave_stopping_to_the_parent

# Images that a CPU encodes at a time when it evaluates: more leave its caches, and gain nothing.
CPU_IMAGES = 4
SHARED_MEMORY = Path("/dev/shm")  # through which loader processes hand over their batches
PREFETCH = 2  # batches that each of them makes ahead


@dataclass(eq=False)
class VisitSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (position, epoch) for one rank.

    A permutation of all refs is cut into global batches, the incomplete last one dropped, and
    each global batch into equal micro-batches, `accumulation` a rank. So which refs make up step
    n is the same on any number of ranks.
    """

    # Positions that stay side by side; the order of groups is random. As published, each ref is
    # a group of its own.
    groups: Sequence[Sequence[int]]
    micro_batch: int  # samples of one forward pass on one rank
    accumulation: int  # forward passes of one optimiser step
    rank: int
    world_size: int
    seed: int  # with the epoch, decides the permutation
    epoch: int = 0
    skip: int = 0

    def __post_init__(self) -> None:
        self.global_batch = self.micro_batch * self.accumulation * self.world_size
        num_refs = sum(map(len, self.groups))
        self.steps = num_refs // self.global_batch
        if self.steps == 0:
            raise UserError(
                f"the training split has {num_refs} refs, fewer than one batch of "
                f"{self.global_batch}; lower TRAIN.batch_size"
            )

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the permutation (and the sentences) of the next pass; epochs count from 0.

        Args:
            skip: optimiser steps at its start that were taken before.
        """
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        """Count the micro-batches of a whole pass."""
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        shuffled = torch.randperm(len(self.groups), generator=generator).tolist()
        order = torch.tensor([position for i in shuffled for position in self.groups[i]])
        steps = order[: self.steps * self.global_batch].view(
            self.steps, self.accumulation, self.world_size, self.micro_batch
        )
        for micro in steps[self.skip :, :, self.rank].flatten(0, 1):
            yield [(position, self.epoch) for position in micro.tolist()]


def build_train_loader(cfg: Config, micro_batch: int, ranks: Ranks) -> DataLoader:
    """Return the loader of this rank's micro-batches of the training split.

    Call `loader.batch_sampler.set_epoch` before each pass.
    """
    train, folder = cfg.TRAIN, cfg.DATA.cache
    records = training_records(cfg)
    by_image = train.batch_by == "images"
    groups = group_positions(records.image_names() if by_image else range(len(records)))
    parts = train.accumulation_steps, ranks.rank, ranks.world_size, train.manual_seed
    sampler = VisitSampler(groups, micro_batch, *parts)
    caches = {
        reader.path: open_cache(folder, reader, train.input_size)
        for reader, _ in (records.parts if folder is not None else ())
    }
    dataset = TrainingDataset(records, train.input_size, train.word_len, train.manual_seed, caches)
    workers = usable_workers(train.workers, ranks, "TRAIN.workers")
    pixels = micro_batch * train.input_size**2
    # Four bytes each; if refs share a photo, its mask's at least.
    options = _worker_options(workers, ranks, len(sampler), pixels * (1 if by_image else 4))
    collate = partial(collate_refs, by_image=by_image)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **options)


def training_records(cfg: Config) -> JoinedReader:
    """Choose the refs to train on: of several files those that lie on no excluded image.

    A single file is trained on whole, as published.

    Raises:
        UserError: nothing is left.
    """
    readers = [RecordReader(path) for path in cfg.DATA.train_lmdb]
    excluded = [RecordReader(path) for path in cfg.DATA.exclude_lmdb] if len(readers) > 1 else []
    records = JoinedReader([(r, np.flatnonzero(~on_images_of(excluded, r))) for r in readers])
    if len(records) == 0:
        raise UserError("every ref of DATA.train_lmdb is on an image of DATA.exclude_lmdb")
    return records


def build_loaders(cfg: Config, micro_batch: int, ranks: Ranks) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of training and validation, on records that the config describes.

    Raises:
        UserError: they are not, or cannot be read, or are fewer than a batch.
    """
    data = cfg.DATA
    for lmdb in data.train_lmdb:
        check_records(cfg, lmdb, data.train_split)
    check_records(cfg, data.val_lmdb, data.val_split)
    training = build_train_loader(cfg, micro_batch, ranks)
    return training, build_evaluation_loader(cfg, data.val_lmdb, ranks, cfg.TRAIN.val_sentences)


def report_records(cfg: Config, records: JoinedReader) -> None:
    """Log how many refs of each file are trained on, and how many lie on images of val.

    Args:
        records: from `training_records`.
    """
    are_several = len(records.parts) > 1
    if are_several:
        for reader, kept in records.parts:
            logger.info(
                f"{reader.path}: {len(kept):,} of {len(reader):,} refs, "
                f"{len(reader) - len(kept):,} left out on images of DATA.exclude_lmdb"
            )
    elif cfg.DATA.exclude_lmdb:
        logger.warning("DATA.exclude_lmdb does nothing with a single DATA.train_lmdb")
    val = [RecordReader(cfg.DATA.val_lmdb)]
    shared = sum(int(on_images_of(val, reader)[kept].sum()) for reader, kept in records.parts)
    line = f"{shared:,} of {len(records):,} training refs are on images of {cfg.DATA.val_lmdb}"
    if shared == 0:
        logger.info(line)
    elif are_several:
        logger.warning(f"{line}; name it in DATA.exclude_lmdb to leave them out")
    else:
        logger.warning(f"{line}; they are kept, as published")


def build_evaluation_loader(
    cfg: Config, lmdb: str, ranks: Ranks, sentences: str = "all", swap: bool = False
) -> DataLoader:
    """Return the loader of this rank's images of a split; sentences come with their images.

    Args:
        lmdb: path of the split's records.
        sentences, swap: see `EvaluationDataset`.
    """
    train = cfg.TRAIN
    dataset = EvaluationDataset(
        RecordReader(lmdb), train.input_size, train.word_len, sentences, swap
    )
    workers = usable_workers(train.workers_val, ranks, "TRAIN.workers_val")
    images = images_at_a_time(train.batch_size_val // ranks.world_size, ranks.device)
    # Without padding: all ranks together see each image exactly once.
    order = range(ranks.rank, len(dataset), ranks.world_size)
    bytes_each = images * train.input_size**2 * 3
    options = _worker_options(workers, ranks, -(-len(order) // images), bytes_each)
    return DataLoader(dataset, images, sampler=order, collate_fn=collate_images, **options)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy a batch's tensors to a device; to a GPU while it still computes the batch before."""
    side = _copy_stream(device) if device.type == "cuda" else None
    with nullcontext() if side is None else torch.cuda.stream(side):
        moved = {
            # Apple's GPU would read memory that is freed by then.
            name: value.to(device, non_blocking=side is not None)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
    if side is not None:
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(side)
        for value in moved.values():
            value.record_stream(compute)  # or its memory could be given away while it is read
    return {**batch, **moved}


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def images_at_a_time(sentences: int, device: torch.device) -> int:
    """Return how many images to encode together where so many sentences are.

    An image brings several sentences; they are what fills the model's batch.
    """
    images = max(1, sentences // 4)
    return min(images, CPU_IMAGES) if device.type == "cpu" else images


def usable_workers(wanted: int, ranks: Ranks, name: str) -> int:
    """Count loader processes for this rank: `wanted` is for the machine, as are its cores."""
    cores = available_cores()
    allowed = min(wanted, cores)
    if allowed < wanted and ranks.is_main:
        logger.info(f"{name} {wanted} → {allowed}: this machine has {cores} cores")
    return -(-allowed // ranks.local_size)


def _worker_options(workers: int, ranks: Ranks, batches: int, batch_bytes: int) -> dict:
    """Return the loader's options; raise UserError if its batches do not fit into shared memory.

    Args:
        batches, batch_bytes: how many there are, and what one takes at least.
    """
    need = min(PREFETCH * workers, batches) * batch_bytes * ranks.local_size
    is_open = os.access(SHARED_MEMORY, os.W_OK)  # not in every sandbox
    free = shutil.disk_usage(SHARED_MEMORY).free if is_open else 0
    if sys.platform == "linux" and need > free:
        raise UserError(
            f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free, the loader processes need "
            f"{need / 1e6:,.0f} MB: {SHM_REMEDY}"
        )
    return {
        "num_workers": workers,
        "worker_init_fn": _start_worker,
        "prefetch_factor": PREFETCH if workers else None,
        "persistent_workers": workers > 0,
        "pin_memory": ranks.device.type == "cuda",
        # Its own generator, or making an iterator would draw from the global one and shift
        # every random number after it.
        "generator": torch.Generator().manual_seed(0),
    }


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    leave_stopping_to_the_parent()
