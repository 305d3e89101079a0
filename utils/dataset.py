"""Refs and sentences as samples: one ref at random sentence for training, whole images to score.

S is the side of the network's input, L the number of tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from utils.cache import SquareCache
from utils.errors import UserError
from utils.records import JoinedReader, RecordReader, RefRecord, group_positions
from utils.seed import draw
from utils.tokenizer import tokenize
from utils.transforms import load_image, load_square_mask


class TrainingSample(TypedDict):
    """One ref with one of its sentences."""

    image_name: tuple[Path, str]  # file and key: images of two files are two images
    image: Tensor  # (S, S, 3) uint8 RGB
    mask: Tensor  # (S, S) uint8, soft at the edges
    tokens: Tensor  # (L,) int64
    position: int  # of the ref in the records


@dataclass(eq=False)
class TrainingDataset(Dataset):
    """Refs of one LMDB or several; each visit draws one of the ref's sentences."""

    records: JoinedReader
    input_size: int  # S
    word_len: int  # L
    seed: int  # with epoch and position, decides the sentence
    # By the path of the LMDB, its photos and masks at S×S, to spare making them.
    caches: Mapping[Path, SquareCache] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, visit: tuple[int, int]) -> TrainingSample:
        """Load the ref of a visit (position, epoch) with one of its sentences.

        The epoch comes with the index, so workers that live through all epochs need no telling.
        """
        return self.__getitems__([visit])[0]

    def __getitems__(self, visits: Sequence[tuple[int, int]]) -> list[TrainingSample]:
        """Load a batch of visits (torch's fetcher calls this), making each image once."""
        images: dict[tuple[Path, str], Tensor] = {}
        samples = []
        for position, epoch in visits:
            reader, place = self.records.places[position]
            ref, cache = reader.ref(place), self.caches.get(reader.path)
            name = reader.path, ref.image_key
            if name not in images:
                image = cache.image(place) if cache else load_image(reader, ref, self.input_size)
                images[name] = torch.from_numpy(image)
            mask = cache.mask(place) if cache else load_square_mask(ref, self.input_size)
            sentence = self._sentence(ref, position, epoch)
            sample = TrainingSample(
                image_name=name,
                image=images[name],
                mask=torch.from_numpy(mask),
                tokens=tokenize(sentence, self.word_len)[0],
                position=position,
            )
            samples.append(sample)
        return samples

    def describe(self, visit: tuple[int, int]) -> tuple[int, str]:
        """Return the ref_id and the drawn sentence of a visit (position, epoch)."""
        ref = self.records.ref(visit[0])
        return ref.ref_id, self._sentence(ref, *visit)

    def _sentence(self, ref: RefRecord, position: int, epoch: int) -> str:
        return ref.sentences[draw("sentence", len(ref.sentences), self.seed, epoch, position)]


class TrainingBatch(TypedDict):
    """B refs on N images; row i belongs to image `image_index[i]`, or to image i if it is None."""

    images: Tensor  # (N, S, S, 3) uint8 RGB
    image_index: Tensor | None  # (B,) int64
    masks: Tensor  # (B, S, S) uint8, soft at the edges
    tokens: Tensor  # (B, L) int64
    positions: Tensor  # (B,) int64


def collate_refs(samples: Sequence[TrainingSample], by_image: bool = False) -> TrainingBatch:
    """Join samples into a batch with one image a ref, as published.

    Args:
        by_image: each image stands in the batch once, however many refs share it.
    """
    images, index = [sample["image"] for sample in samples], None
    if by_image:
        shown = {sample["image_name"]: sample["image"] for sample in samples}
        rows = {name: row for row, name in enumerate(shown)}
        images = list(shown.values())
        index = torch.tensor([rows[sample["image_name"]] for sample in samples])
    # In a worker default_collate stacks straight into memory that the main process shares.
    # torch.stack would leave the worker's heap in a gigabyte of pieces.
    return TrainingBatch(
        images=default_collate(images),
        image_index=index,
        masks=default_collate([sample["mask"] for sample in samples]),
        tokens=torch.stack([sample["tokens"] for sample in samples]),
        positions=torch.tensor([sample["position"] for sample in samples]),
    )


@dataclass(frozen=True)
class SentenceTask:
    """One sentence to score: `key` = (position of the sentence's ref, its place there) is unique.

    `ref` is the ref whose mask and `num_targets` count; `sentence` and `sent_id` are its own
    unless swapped.
    """

    key: tuple[int, int]
    ref: RefRecord
    sentence: str
    sent_id: int


class ImageSample(TypedDict):
    """One image with the N sentences to score on it."""

    image: Tensor  # (S, S, 3) uint8 RGB
    tokens: Tensor  # (N, L) int64
    tasks: list[SentenceTask]


@dataclass(eq=False)
class EvaluationDataset(Dataset):
    """Images of one LMDB, each with all the sentences of all its refs, so it is read once.

    sentences: "all" of every ref, or "first" (what the release's validation scores).
    swap: give each ref the sentences of the next ref of the same image, the control that shows
        whether a model reads; images with one ref are left out.
    """

    reader: RecordReader
    input_size: int  # S
    word_len: int  # L
    sentences: str = "all"
    swap: bool = False

    def __post_init__(self) -> None:
        groups = group_positions(self.reader.index.image_keys)
        self.groups = [group for group in groups if len(group) > 1 or not self.swap]
        if not self.groups:
            raise UserError(
                f"{self.reader.path}: no image has two refs whose sentences could be swapped"
            )

    def __len__(self) -> int:
        return len(self.groups)

    def keys(self) -> set[tuple[int, int]]:
        """Return the key of every sentence that has to be scored."""
        counts = self.reader.index.num_sentences
        return {
            (position, place)
            for group in self.groups
            for position in group
            for place in range(1 if self.sentences == "first" else counts[position])
        }

    def mask_source(self, key: tuple[int, int]) -> RefRecord:
        """Return the ref whose mask a sentence is scored against: its own, unless swapped."""
        if not self.swap:
            return self.reader.ref(key[0])
        group = next(group for group in self.groups if key[0] in group)
        return self.reader.ref(group[group.index(key[0]) - 1])

    def __getitem__(self, i: int) -> ImageSample:
        """Load image `i` and its sentences."""
        refs = [self.reader.ref(position) for position in self.groups[i]]
        sources = list(zip(self.groups[i], refs, strict=True))
        if self.swap:
            sources = sources[1:] + sources[:1]
        tasks = [
            SentenceTask((position, place), ref, sentence, source.sent_ids[place])
            for ref, (position, source) in zip(refs, sources, strict=True)
            for place, sentence in enumerate(source.sentences)
            if place == 0 or self.sentences == "all"
        ]
        image = torch.from_numpy(load_image(self.reader, refs[0], self.input_size))
        tokens = tokenize([task.sentence for task in tasks], self.word_len)
        return ImageSample(image=image, tokens=tokens, tasks=tasks)


class EvaluationBatch(TypedDict):
    """B images and their N sentences; row i of `tokens` belongs to image `image_index[i]`."""

    images: Tensor  # (B, S, S, 3) uint8 RGB
    image_index: Tensor  # (N,) int64
    tokens: Tensor  # (N, L) int64
    tasks: list[SentenceTask]


def collate_images(samples: Sequence[ImageSample]) -> EvaluationBatch:
    """Join images into a batch."""
    counts = torch.tensor([len(sample["tasks"]) for sample in samples])
    return EvaluationBatch(
        images=default_collate([sample["image"] for sample in samples]),
        image_index=torch.repeat_interleave(torch.arange(len(samples)), counts),
        tokens=torch.cat([sample["tokens"] for sample in samples]),
        tasks=[task for sample in samples for task in sample["tasks"]],
    )
