"""Samplers and loaders. The order of samples depends on seed and epoch alone, never on workers."""

import os
from collections.abc import Iterator, Sequence

import cv2
import torch
from loguru import logger
from torch.utils.data import DataLoader, Sampler

from utils.config import Config
from utils.dataset import (
    EvaluationDataset,
    TrainingDataset,
    collate_images,
    collate_refs,
    collate_refs_by_image,
    group_by_image,
)
from utils.distributed import Ranks
from utils.errors import UserError
from utils.records import RecordReader


class VisitSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (position, epoch) for one rank.

    A permutation of all refs is cut into global batches, the incomplete last one dropped, and
    each global batch into equal micro-batches, `accumulation` a rank. So which refs make up step
    n is the same on any number of ranks.

    Args:
        groups: positions that stay side by side; only the order of groups is random. As
            published, each ref is a group of its own.
        micro_batch: samples of one forward pass on one rank.
        accumulation: forward passes of one optimiser step.
        rank, world_size: this rank, and how many there are.
        seed: with the epoch, decides the permutation.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.groups = groups
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        global_batch = micro_batch * accumulation * world_size
        num_refs = sum(map(len, groups))
        self.steps = num_refs // global_batch
        if self.steps == 0:
            raise UserError(
                f"the training split has {num_refs} refs, fewer than one batch of {global_batch}; "
                "lower TRAIN.batch_size"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation (and the sentences) of the next pass; epochs count from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        shuffled = torch.randperm(len(self.groups), generator=generator).tolist()
        order = torch.tensor([position for i in shuffled for position in self.groups[i]])
        global_batch = self.micro_batch * self.accumulation * self.world_size
        steps = order[: self.steps * global_batch].view(
            self.steps, self.accumulation, self.world_size, self.micro_batch
        )
        for micro in steps[:, :, self.rank].flatten(0, 1):
            yield [(position, self.epoch) for position in micro.tolist()]


class ShardSampler(Sampler[int]):
    """Every `world_size`-th image, without padding: all ranks together see each exactly once."""

    def __init__(self, num_images: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, num_images, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def build_train_loader(cfg: Config, micro_batch: int, ranks: Ranks) -> DataLoader:
    """This rank's micro-batches of the training split.

    Call `loader.batch_sampler.set_epoch` before each pass.
    """
    train = cfg.TRAIN
    dataset = TrainingDataset(
        RecordReader(cfg.DATA.train_lmdb), train.input_size, train.word_len, train.manual_seed
    )
    by_image = train.batch_by == "images"
    groups = group_by_image(dataset.reader) if by_image else [[i] for i in range(len(dataset))]
    sampler = VisitSampler(
        groups,
        micro_batch,
        train.accumulation_steps,
        ranks.rank,
        ranks.world_size,
        train.manual_seed,
    )
    workers = usable_workers(train.workers, ranks, "TRAIN.workers")
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_refs_by_image if by_image else collate_refs,
        **_worker_options(workers, ranks),
    )


def build_evaluation_loader(
    cfg: Config, lmdb: str, ranks: Ranks, sentences: str = "all", swap: bool = False
) -> DataLoader:
    """This rank's images of a split; sentences come with their images.

    Args:
        lmdb: path of the split's records.
        sentences, swap: see `EvaluationDataset`.
    """
    train = cfg.TRAIN
    dataset = EvaluationDataset(
        RecordReader(lmdb), train.input_size, train.word_len, sentences, swap
    )
    workers = usable_workers(train.workers_val, ranks, "TRAIN.workers_val")
    return DataLoader(
        dataset,
        # An image brings several sentences; they are what fills the model's batch.
        batch_size=max(1, train.batch_size_val // (4 * ranks.world_size)),
        sampler=ShardSampler(len(dataset), ranks.rank, ranks.world_size),
        collate_fn=collate_images,
        **_worker_options(workers, ranks),
    )


def usable_workers(wanted: int, ranks: Ranks, name: str) -> int:
    """Loader processes for this rank: `wanted` is for the machine, as are its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    allowed = min(wanted, cores)
    if allowed < wanted and ranks.is_main:
        logger.info(f"{name} {wanted} → {allowed}: this machine has {cores} cores")
    return -(-allowed // ranks.local_size)


def _worker_options(workers: int, ranks: Ranks) -> dict:
    return {
        "num_workers": workers,
        "worker_init_fn": _start_worker,
        "persistent_workers": workers > 0,
        "pin_memory": ranks.device.type == "cuda",
        # Its own generator, or making an iterator would draw from the global one and shift
        # every random number after it.
        "generator": torch.Generator().manual_seed(0),
    }


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
