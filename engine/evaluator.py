"""The one evaluation loop: training validates with it and test.py scores with it.

Per sentence: logits → probability → up to S×S → back to the photo's own size → threshold → IoU
with the mask at that size. An image is encoded once for all its sentences, and masks are restored
and compared in threads while the model computes the next batch.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engine.loaders import to_device
from model.fold import check_folding, fold_batch_norm
from model.loss import resize_target
from model.neck import ImageFeatures
from utils.config import TestConfig
from utils.dataset import EvaluationDataset, SentenceTask
from utils.distributed import gather_objects
from utils.machine import available_cores
from utils.metrics import (
    brief_names,
    count_lines,
    describe_rule,
    intersection_and_union,
    iou,
    percent,
)
from utils.transforms import (
    PROTOCOLS,
    Protocol,
    letterbox_mask,
    load_mask,
    normalize_images,
    normalize_masks,
    restore_size,
    upsample_probability,
)

# More at a time leave the CPU's caches, and gain nothing.
CPU_SENTENCES = 4
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

# A ref's sentences come one after the other.
_mask_of = lru_cache(maxsize=64)(load_mask)


@dataclass(frozen=True)
class SentenceScore:
    """One sentence under one protocol. Counts are pixels at the photo's size.

    `ceiling_*` are the counts of a prediction that equals the training target of the protocol:
    what a perfect model would reach at this input size. They and `pred_rle` are filled on demand.
    `num_targets` is 0 where the sentence is true of nothing.
    """

    key: tuple[int, int]
    ref_id: int
    sent_id: int
    sentence: str
    image: str
    image_id: int | None
    category: int | None
    height: int
    width: int
    target_area: int
    intersection: int
    union: int
    ceiling_intersection: int | None = None
    ceiling_union: int | None = None
    pred_rle: str | None = None
    num_targets: int = 1

    @property
    def iou(self) -> float:
        """In [0, 1]; without a target 1 if nothing is predicted, else 0."""
        return iou(self.intersection, self.union) if self.num_targets else float(self.union == 0)

    def record(self) -> dict:
        """Return the line of the JSON Lines file (COCO RLE, sizes in pixels)."""
        line = asdict(self)
        for name in ("key", "ceiling_intersection", "ceiling_union", "pred_rle"):
            del line[name]
        if self.num_targets == 1:
            del line["num_targets"]  # as in the records
        rle = {"size": [self.height, self.width], "counts": self.pred_rle}
        return line | {"iou": self.iou, "pred_rle": rle}


def resolve_protocols(test: TestConfig) -> dict[str, Protocol]:
    """Return the protocols that a config's test scores by, by name; of both, aligned first."""
    names = ("aligned", "published") if test.protocol == "both" else (test.protocol,)
    changes = {"no_target_pixels": test.no_target_pixels}
    if test.threshold is not None:
        changes["threshold"] = test.threshold
    return {name: replace(PROTOCOLS[name], **changes) for name in names}


def validation_protocol(test: TestConfig) -> dict[str, Protocol]:
    """Return the one protocol that selects checkpoints: the first of those of the test."""
    return dict(list(resolve_protocols(test).items())[:1])


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    protocols: Mapping[str, Protocol],
    sentences_per_batch: int,
    *,
    precision: str = "fp32",
    in_full: Container[tuple[int, int]] = (),
    progress: Iterable | None = None,
    batches: int | None = None,
) -> dict[str, list[SentenceScore]]:
    """Score every sentence of a split exactly once, on all ranks together.

    Args:
        model: the unwrapped segmenter; left as it is, since a twin with folded BatchNorm predicts.
        loader: from `engine.loaders.build_evaluation_loader`, this rank's share.
        device: where the model is.
        protocols: by name; the model runs once for all of them.
        sentences_per_batch: at most so many at a time.
        precision: that the model computes in: fp32, tf32, bf16 or fp16.
        in_full: keys of the sentences whose `pred_rle` and `ceiling_*` to fill.
        progress: wraps the loader, to show how far it is.
        batches: score each rank's first so many alone; None: the whole split, which is asserted.
    Returns:
        By protocol, the scores of all ranks' sentences in the order of the LMDB, on every rank.
        Small predictions are emptied if the split has sentences without a target.
    Raises:
        RuntimeError: a sentence was scored twice or not at all; or folding changes the model.
    """
    if "no_target" not in loader.dataset.reader.meta:
        protocols = {n: replace(p, no_target_pixels=1) for n, p in protocols.items()}
    twin = fold_batch_norm(model)
    rows: list[dict[str, SentenceScore]] = []
    running: list[Future] = []
    pool = ThreadPoolExecutor(max(available_cores() // 2, 2))
    try:
        source = loader if progress is None else progress
        for number, batch in enumerate(islice(source, batches)):
            batch = to_device(batch, device)
            tokens, image_index = batch["tokens"], batch["image_index"]
            images, side = normalize_images(batch["images"]), batch["images"].shape[1]
            if number == 0:
                _check_twin(model, images, tokens)
            before, running = running, []
            with computing_in(precision, device):
                features = twin.encode_image(images)
                for part, squares in probability_maps(
                    twin, features, image_index, tokens, side, protocols, sentences_per_batch
                ):
                    for row, task in enumerate(batch["tasks"][part]):
                        job = _score, task, row, squares, protocols, in_full
                        running.append(pool.submit(*job))
            rows += [job.result() for job in before]
        rows += [job.result() for job in running]
    finally:
        pool.shutdown(cancel_futures=True)  # who is stopped, or fails, leaves the rest unscored
    expected = loader.dataset.keys() if batches is None else None
    return {name: _gather([row[name] for row in rows], expected) for name in protocols}


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Let products and convolutions compute in fp32, tf32, bf16 or fp16."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before, is_tf32, half = matmul.allow_tf32, precision == "tf32", HALF.get(precision)
    # Numbers of sentences vary too much to try algorithms (benchmark) for each.
    flags = {"enabled": cudnn.enabled, "deterministic": cudnn.deterministic, "benchmark": False}
    matmul.allow_tf32 = is_tf32
    try:
        with (
            cudnn.flags(**flags, allow_tf32=is_tf32),
            torch.autocast(device.type, half, enabled=half is not None),
        ):
            yield
    finally:
        matmul.allow_tf32 = before


def _check_twin(model: nn.Module, images: Tensor, tokens: Tensor) -> None:
    """Compare the folded twin with the model on a batch's first sentence, of its first image."""
    with computing_in("fp32", images.device):
        check_folding(model, lambda each: each.segment(each.encode_image(images[:1]), tokens[:1]))


def summarize_scores(scores: Iterable[SentenceScore], prefix: str = "") -> dict[str, float | None]:
    """Return mIoU, oIoU and Pr@X of scored sentences; gIoU and so on if one has no target.

    With the prefix `ceiling_`, those of a perfect model, from scores in full.
    """
    return count_lines(map(vars, scores), prefix).scores()


def describe_scores(
    scores: Mapping[str, float], dataset: EvaluationDataset, protocols: Mapping[str, Protocol]
) -> str:
    """Say what validation found, in per cent, with all that such a number depends on."""
    meta, (name, protocol) = dataset.reader.meta, next(iter(protocols.items()))
    first = "first " if dataset.sentences == "first" else ""
    if protocol.threshold != PROTOCOLS[name].threshold:
        name += f", threshold {protocol.threshold:g}"
    rule = {"N-acc": f" (none: {describe_rule(protocol.no_target_pixels)})"}
    numbers = (f"{key} {percent(scores[key])}{rule.get(key, '')}" for key in brief_names(scores))
    return (
        f"{meta['dataset']} {meta['split']}, {scores['sentences']:,} {first}sentences, {name}: "
        + ", ".join(numbers)
    )


@torch.inference_mode()
def probability_maps(
    model: nn.Module,
    features: ImageFeatures,
    image_index: Tensor,
    tokens: Tensor,
    side: int,
    protocols: Mapping[str, Protocol],
    sentences_per_batch: int,
) -> Iterator[tuple[slice, Callable[[], dict[str, np.ndarray]]]]:
    """Answer sentences on encoded images, some at a time.

    Args:
        features: of N images, on the model's device like the next two.
        image_index: (B,) int64, which image each sentence is about.
        tokens: (B, L) int64.
        side: S, of the maps.
        sentences_per_batch: at most so many at a time, and on a CPU `CPU_SENTENCES`.
    Yields:
        Which sentences, and a function that waits for their probabilities by protocol:
        (sentences, S, S) float32.
    """
    if tokens.device.type == "cpu":
        sentences_per_batch = min(sentences_per_batch, CPU_SENTENCES)
    for start in range(0, len(tokens), sentences_per_batch):
        part = slice(start, start + sentences_per_batch)
        logits = model.segment(features.repeat(image_index[part]), tokens[part])
        probability = logits.float().sigmoid()
        squares = {
            name: upsample_probability(probability, side, protocol)
            for name, protocol in protocols.items()
        }
        yield part, _bring_back(squares)


def _bring_back(maps: Mapping[str, Tensor]) -> Callable[[], dict[str, np.ndarray]]:
    """Begin to copy maps to the host; the function that is returned waits for them."""
    is_cuda = next(iter(maps.values())).device.type == "cuda"
    # Such copies go to pinned memory: neither the host nor the next batch waits for them.
    host = {name: square.to("cpu", non_blocking=is_cuda) for name, square in maps.items()}
    if is_cuda:
        done = torch.cuda.Event()
        done.record()

    def wait() -> dict[str, np.ndarray]:
        if is_cuda:
            done.synchronize()
        return {name: square.numpy() for name, square in host.items()}

    return wait


def _score(
    task: SentenceTask,
    row: int,
    squares: Callable[[], Mapping[str, np.ndarray]],
    protocols: Mapping[str, Protocol],
    in_full: Container[tuple[int, int]],
) -> dict[str, SentenceScore]:
    """Restore one sentence's maps to the photo's size and count pixels."""
    maps = {name: square[row] for name, square in squares().items()}
    truth = _mask_of(task.ref)
    scores = {}
    for name, protocol in protocols.items():
        masks = [restore_size(maps[name], truth.shape) > protocol.threshold]
        if task.key in in_full:
            masks.append(perfect_prediction(truth, len(maps[name]), protocol))
        for mask in masks:
            mask &= np.count_nonzero(mask) >= protocol.no_target_pixels
        scores[name] = score_masks(task, truth > 0, *masks)
    return scores


def score_masks(
    task: SentenceTask, truth: np.ndarray, pred_mask: np.ndarray, perfect: np.ndarray | None = None
) -> SentenceScore:
    """Count the pixels of masks, (H, W) bool.

    Args:
        perfect: the prediction of a perfect model; None leaves what is filled on demand.
    """
    ref, is_full = task.ref, perfect is not None
    intersection, union = intersection_and_union(pred_mask, truth)
    best = intersection_and_union(perfect, truth) if is_full else (None, None)
    return SentenceScore(
        key=task.key,
        ref_id=ref.ref_id,
        sent_id=task.sent_id,
        sentence=task.sentence,
        image=ref.image_key,
        image_id=ref.image_id,
        category=ref.category,
        height=ref.height,
        width=ref.width,
        target_area=int(np.count_nonzero(truth)),
        intersection=intersection,
        union=union,
        ceiling_intersection=best[0],
        ceiling_union=best[1],
        pred_rle=encode_rle(pred_mask) if is_full else None,
        num_targets=ref.num_targets,
    )


def perfect_prediction(mask: np.ndarray, side: int, protocol: Protocol) -> np.ndarray:
    """Return the mask that comes out when the network reproduces its training target exactly.

    Args:
        mask: (H, W) uint8, the ground truth as stored.
        side: S.
    Returns:
        (H, W) bool.
    """
    square = normalize_masks(torch.from_numpy(letterbox_mask(mask, side))[None])
    target = resize_target(square, (side // 4, side // 4), protocol.target)
    restored = restore_size(upsample_probability(target, side, protocol)[0].numpy(), mask.shape)
    return restored > protocol.threshold


def encode_rle(mask: np.ndarray) -> str:
    """Return the counts of a COCO RLE of an (H, W) bool mask."""
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def _gather(
    scores: list[SentenceScore], expected: set[tuple[int, int]] | None
) -> list[SentenceScore]:
    """Join the ranks' scores and assert that each sentence expected is there exactly once."""
    joined = [score for part in gather_objects(scores) for score in part]
    keys = {score.key for score in joined}
    if expected is not None and (len(joined) != len(expected) or keys != expected):
        missing, twice = len(expected - keys), len(joined) - len(keys)
        raise RuntimeError(f"sentences not scored: {missing}, scored twice: {twice}")
    return sorted(joined, key=lambda score: score.key)
