"""How fast samples are read: several ways, compared and timed on one core, or a config's epoch."""

import argparse
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from tools.measure import ratios, spread
from utils.errors import UserError
from utils.machine import peak_memory, peak_usage

BATCH = 16
BASELINE = "straightforward"


def compare_readers(args: argparse.Namespace, cache: Path) -> dict:
    """Check that all ways of reading give the same, time them in turn, print a table.

    Returns:
        What was compared and measured.
    """
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    ways = ways_of_reading(args.lmdb, cache, args.input_size, args.word_len)
    compared = sameness(ways)
    print(f"{compared}\n")
    rates = measure(ways, args.rounds)
    print(f"{'':<44}{'samples/s':>10}{'times the first':>17}{'(range)':>15}")
    rows = {}
    for name, values in rates.items():
        rate, times = spread(values), ratios(values, rates[BASELINE])
        bounds = f"({times.low:.2f}-{times.high:.2f})"
        print(f"{name:<44}{rate.median:>10.1f}{times.median:>17.2f}{bounds:>15}")
        rows[name] = {"samples_per_second": rate._asdict(), "ratio": times._asdict()}
    print(f"\none core, medians of {args.rounds} rounds in turn, {args.input_size} pixels")
    return {"compared": compared, "rounds": args.rounds, "ways": rows}


def ways_of_reading(lmdbs: Sequence[Path], cache: Path, side: int, word_len: int) -> dict:
    """By name, loaders over the same refs, every one of them once: batches of `BATCH`."""
    from torch.utils.data import DataLoader

    from engine.loaders import make_caches
    from utils.dataset import (
        TrainingDataset,
        collate_refs,
        collate_refs_by_image,
        group_by_image,
    )
    from utils.records import JoinedReader, RecordReader

    readers = [RecordReader(path) for path in lmdbs]
    records = JoinedReader([(reader, range(len(reader))) for reader in readers])
    caches = make_caches(cache, readers, side, print)
    plain = TrainingDataset(records, side, word_len, seed=0)
    cached = TrainingDataset(records, side, word_len, seed=0, caches=caches)
    by_refs = _batches([[position] for position in range(len(records))])
    by_images = _batches(group_by_image(records))
    print(f"{len(records)} refs on {sum(r.meta['images'] for r in readers)} images")
    return {
        BASELINE: DataLoader(Straightforward(records, side, word_len), batch_sampler=by_refs),
        "this, batch_by refs": DataLoader(plain, batch_sampler=by_refs, collate_fn=collate_refs),
        "this, batch_by refs, normalised on the CPU": _Normalized(
            DataLoader(plain, batch_sampler=by_refs, collate_fn=collate_refs)
        ),
        "this, batch_by images": DataLoader(
            plain, batch_sampler=by_images, collate_fn=collate_refs_by_image
        ),
        "this, DATA.cache, batch_by refs": DataLoader(
            cached, batch_sampler=by_refs, collate_fn=collate_refs
        ),
        "this, DATA.cache, batch_by images": DataLoader(
            cached, batch_sampler=by_images, collate_fn=collate_refs_by_image
        ),
    }


def _batches(groups: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Visits of epoch 0 in a random order of groups."""
    import torch

    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    visits = [(position, 0) for i in order for position in groups[i]]
    return [visits[i : i + BATCH] for i in range(0, len(visits), BATCH)]


class Straightforward:
    """What a loader for CRIS does if nobody thinks about it: all the way to floats, a ref a time.

    The measure of the others: decode to BGR, swap, warp, float, normalise.
    """

    def __init__(self, records, side: int, word_len: int) -> None:
        self.records, self.side, self.word_len = records, side, word_len

    def __getitem__(self, visit: tuple[int, int]) -> dict:
        """{image (3, S, S) float32 normalised, mask (S, S) float32 in [0, 1], tokens (L,), …}."""
        from tools.published import read_image, read_mask
        from utils.seed import draw
        from utils.tokenizer import tokenize

        position, epoch = visit
        reader, place = self.records.locate(position)
        ref = reader.ref(place)
        sentence = ref.sentences[draw(len(ref.sentences), 0, epoch, position)]
        return {
            "image": read_image(reader.image(ref.image_key), self.side),
            "mask": read_mask(ref.mask, self.side)[0],
            "tokens": tokenize(sentence, self.word_len)[0],
            "position": position,
        }


class _Normalized:
    """A loader whose batches are normalised where they are."""

    def __init__(self, loader) -> None:
        self.loader = loader

    def __iter__(self):
        from utils.transforms import normalize_images, normalize_masks

        for batch in self.loader:
            images, masks = normalize_images(batch["images"]), normalize_masks(batch["masks"])
            yield {**batch, "images": images, "masks": masks}


def sameness(ways: Mapping) -> str:
    """Compare what the ways give for every ref.

    Raises:
        UserError: images or masks differ, or normalised ones by more than one unit in the last
            place.
    """
    from utils.transforms import normalize_images, normalize_masks

    expected, units = {}, 0.0
    for batch in ways[BASELINE]:
        rows = zip(batch["position"].tolist(), batch["image"], batch["mask"], strict=True)
        expected |= {position: (image, mask) for position, image, mask in rows}
    first: dict = {}
    for name, loader in ways.items():
        if name == BASELINE or isinstance(loader, _Normalized):
            continue
        for batch in loader:
            index = batch["image_index"]
            images = batch["images"] if index is None else batch["images"][index]
            floats = normalize_images(images), normalize_masks(batch["masks"])[:, 0]
            for row, position in enumerate(batch["positions"].tolist()):
                pair = images[row].numpy(), batch["masks"][row].numpy()
                if not all(map(np.array_equal, first.setdefault(position, pair), pair)):
                    raise UserError(f"{name}: pixels of the ref at {position} differ")
                for made, wanted in zip(floats, expected[position], strict=True):
                    units = max(units, units_in_the_last_place(made[row].numpy(), wanted.numpy()))
    if units > 1 or first.keys() != expected.keys():
        raise UserError(f"normalised images or masks differ by {units} units in the last place")
    return (
        "uint8 images and masks: identical in all ways; normalised: at most "
        f"{units:g} unit(s) in the last place from the straightforward ones"
    )


def units_in_the_last_place(a, b) -> float:
    """The largest difference of two float32 arrays, in units of the spacing at their values."""
    spacing = np.spacing(np.maximum(np.abs(a), np.abs(b)))
    return float((np.abs(a.astype(np.float64) - b) / spacing).max())


def measure(ways: Mapping, rounds: int) -> dict[str, list[float]]:
    """Samples a second of each way in each round; the ways take turns, after one turn unmeasured.

    A machine is faster in one minute than in another: ratios within a round hold.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, loader in ways.items():
            count, start = 0, time.perf_counter()
            for batch in loader:
                count += len(batch["tokens"])
            if number:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def time_epoch(config: str, opts: Sequence[str], show: Callable[[str], object] = print) -> dict:
    """Go once through the training loader of a config; show time, rate and peak memory.

    Returns:
        The same as numbers: seconds, bytes.
    """
    import torch

    from engine.loaders import build_train_loader, report_records
    from utils.config import check_batch, load_config
    from utils.distributed import Ranks
    from utils.logger import progress, setup_logging

    cfg = load_config(config, opts)
    setup_logging(None, is_main=True)
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    start = time.perf_counter()
    loader = build_train_loader(cfg, check_batch(cfg.TRAIN, 1), ranks)
    built = time.perf_counter()
    report_records(cfg, loader.dataset.reader)
    refs = images = 0
    for batch in progress(loader, len(loader), "epoch"):
        refs += len(batch["tokens"])
        images += len(batch["images"])
    seconds = time.perf_counter() - built
    workers = loader.num_workers
    del loader  # its processes end, and so their memory is known
    largest = peak_usage(resource.RUSAGE_CHILDREN) if workers else None
    show(
        f"{refs:,} refs with {images:,} images in {seconds:.1f} s: {refs / seconds:.1f} refs/s; "
        f"{workers} workers; {built - start:.1f} s to begin with"
    )
    worker = "none" if largest is None else megabytes(largest)
    show(f"peak memory: {megabytes(peak_memory())}, the largest worker {worker}")
    return {
        "refs": refs,
        "images": images,
        "seconds": seconds,
        "workers": workers,
        "peak_memory": peak_memory(),
        "peak_memory_of_a_worker": largest,
    }


def megabytes(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e6:,.0f} MB"
