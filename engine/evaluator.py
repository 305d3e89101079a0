"""The one evaluation loop: training validates with it and test.py scores with it.

Per sentence: logits → probability → up to S×S → back to the photo's own size → threshold → IoU
with the mask at that size. An image is encoded once for all its sentences, and masks are restored
and compared in threads while the model computes the next batch.
"""

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
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
from utils.config import Config
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
# Sentences whose maps may wait: they pile up where threads are slower than the model.
MAX_PENDING = 512
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

    def emptied_below(self, pixels: int) -> "SentenceScore":
        """Empty the prediction, and that of the ceiling, if it has fewer pixels."""
        changes = {}
        for prefix in ("", "ceiling_"):
            names = f"{prefix}intersection", f"{prefix}union"
            intersection, union = (getattr(self, name) for name in names)
            if union is not None and union - self.target_area + intersection < pixels:
                changes |= dict(zip(names, (0, self.target_area), strict=True))
        if self.pred_rle is not None and "union" in changes:
            changes["pred_rle"] = encode_rle(np.zeros((self.height, self.width), bool))
        return replace(self, **changes)


def resolve_protocols(
    name: str, threshold: float | None = None, no_target_pixels: int = 1
) -> dict[str, Protocol]:
    """The protocols that a config asks for, by name: one, or both with aligned first.

    Args:
        name: "published", "aligned" or "both".
        threshold: replaces the protocol's own, if given.
        no_target_pixels: a smaller mask is emptied where sentences may have no target.
    """
    names = ("aligned", "published") if name == "both" else (name,)
    changes = {} if threshold is None else {"threshold": threshold}
    changes["no_target_pixels"] = no_target_pixels
    return {n: replace(PROTOCOLS[n], **changes) for n in names}


def scoring_protocols(cfg: Config) -> dict[str, Protocol]:
    """The protocols that the test scores by."""
    test = cfg.TEST
    return resolve_protocols(test.protocol, test.threshold, test.no_target_pixels)


def validation_protocol(cfg: Config) -> dict[str, Protocol]:
    """The one protocol that selects checkpoints: the first of those that the test scores by."""
    name, *_ = chosen = scoring_protocols(cfg)
    return {name: chosen[name]}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    protocols: Mapping[str, Protocol],
    sentences_per_batch: int,
    *,
    precision: str = "fp32",
    ceiling: bool = False,
    rle: Container[tuple[int, int]] = (),
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
        ceiling: fill these fields of the scores.
        rle: keys of the sentences whose `pred_rle` to fill.
        progress: wraps the loader, to show how far it is.
        batches: score each rank's first so many alone; None: the whole split, which is asserted.
    Returns:
        By protocol, the scores of all ranks' sentences in the order of the LMDB, on every rank.
        Where one of the sentences has no target, small predictions are emptied.
    Raises:
        RuntimeError: a sentence was scored twice or not at all; or folding changes the model.
    """
    model, plain = fold_batch_norm(model), model
    pending: deque[Future] = deque()
    rows: list[dict[str, SentenceScore]] = []
    pool = ThreadPoolExecutor(max(available_cores() // 2, 2))
    try:
        source = loader if progress is None else progress
        for number, batch in enumerate(islice(source, batches)):
            batch = to_device(batch, device)
            tokens, image_index = batch["tokens"], batch["image_index"]
            images, side = normalize_images(batch["images"]), batch["images"].shape[1]
            if number == 0:
                first = partial(answer_first, images=images, tokens=tokens, index=image_index)
                with computing_in("fp32", device):
                    check_folding(plain, first)
            with computing_in(precision, device):
                features = model.encode_image(images)
                for part, squares in probability_maps(
                    model, features, image_index, tokens, side, protocols, sentences_per_batch
                ):
                    for row, task in enumerate(batch["tasks"][part]):
                        job = _score, task, row, squares, protocols, ceiling, rle
                        pending.append(pool.submit(*job))
            rows += _take(pending, MAX_PENDING)
        rows += _take(pending, 0)
    finally:
        pool.shutdown(cancel_futures=True)  # who is stopped, or fails, leaves the rest unscored
    scores = {name: [row[name] for row in rows] for name in protocols}
    expected = loader.dataset.keys() if batches is None else None
    joined = {name: _gather(scores[name], expected) for name in protocols}
    if all(score.num_targets for score in next(iter(joined.values()))):
        return joined
    return {
        name: [score.emptied_below(protocols[name].no_target_pixels) for score in joined[name]]
        for name in protocols
    }


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Let products and convolutions compute in fp32, tf32, bf16 or fp16."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before, is_tf32 = matmul.allow_tf32, precision == "tf32"
    # Numbers of sentences vary too much to try algorithms (benchmark) for each.
    flags = {"enabled": cudnn.enabled, "deterministic": cudnn.deterministic, "benchmark": False}
    half = HALF.get(precision)
    matmul.allow_tf32 = is_tf32
    try:
        with (
            cudnn.flags(**flags, allow_tf32=is_tf32),
            torch.autocast(device.type, half, enabled=half is not None),
        ):
            yield
    finally:
        matmul.allow_tf32 = before


def answer_first(model: nn.Module, images: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
    """Return the logits of a batch's first sentence; `index` tells the sentences' images."""
    features = model.encode_image(images.index_select(0, index[:1]))
    return model.segment(features, tokens[:1])


def summarize_scores(scores: Iterable[SentenceScore]) -> dict[str, float | None]:
    """mIoU, oIoU and Pr@X of scored sentences; gIoU and so on where one of them has no target."""
    return count_lines(map(vars, scores)).scores()


def summarize_ceiling(scores: Iterable[SentenceScore]) -> dict[str, float | None]:
    """Summarise what a perfect model would score; needs scores made with `ceiling=True`."""
    return count_lines(map(vars, scores), "ceiling_").scores()


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
    host, done = maps, None
    if next(iter(maps.values())).device.type == "cuda":
        # Pinned, so that neither the host nor the next batch waits for the copy.
        host = {n: torch.empty(m.shape, dtype=m.dtype, pin_memory=True) for n, m in maps.items()}
        for name, square in maps.items():
            host[name].copy_(square, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

    def wait() -> dict[str, np.ndarray]:
        if done is not None:
            done.synchronize()
        return {name: square.cpu().numpy() for name, square in host.items()}

    return wait


def _score(
    task: SentenceTask,
    row: int,
    squares: Callable[[], Mapping[str, np.ndarray]],
    protocols: Mapping[str, Protocol],
    ceiling: bool,
    rle: Container[tuple[int, int]],
) -> dict[str, SentenceScore]:
    """Restore one sentence's maps to the photo's size and count pixels."""
    ref = task.ref
    maps = {name: square[row] for name, square in squares().items()}
    soft = _mask_of(ref)
    mask = soft > 0
    scores = {}
    for name, protocol in protocols.items():
        pred_mask = restore_size(maps[name], mask.shape) > protocol.threshold
        intersection, union = intersection_and_union(pred_mask, mask)
        best = None, None
        if ceiling:
            perfect = perfect_prediction(soft, len(maps[name]), protocol)
            best = intersection_and_union(perfect, mask)
        scores[name] = SentenceScore(
            key=task.key,
            ref_id=ref.ref_id,
            sent_id=task.sent_id,
            sentence=task.sentence,
            image=ref.image_key,
            image_id=ref.image_id,
            category=ref.category,
            height=ref.height,
            width=ref.width,
            target_area=int(np.count_nonzero(mask)),
            intersection=intersection,
            union=union,
            ceiling_intersection=best[0],
            ceiling_union=best[1],
            pred_rle=encode_rle(pred_mask) if task.key in rle else None,
            num_targets=ref.num_targets,
        )
    return scores


def perfect_prediction(mask: np.ndarray, side: int, protocol: Protocol) -> np.ndarray:
    """The mask that comes out when the network reproduces its training target exactly.

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
    """(H, W) bool -> the counts of a COCO RLE."""
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def _take(pending: deque[Future], left: int) -> Iterator[dict[str, SentenceScore]]:
    """The oldest results: those that are there, and as many more as leave no more than `left`.

    What a thread raised is raised here, soon after.
    """
    while pending and (len(pending) > left or pending[0].done()):
        yield pending.popleft().result()


def _gather(
    scores: list[SentenceScore], expected: set[tuple[int, int]] | None
) -> list[SentenceScore]:
    """Join the ranks' scores and assert that each sentence expected is there exactly once."""
    joined = [score for part in gather_objects(scores) for score in part]
    keys = [score.key for score in joined]
    if expected is not None and (len(keys) != len(expected) or set(keys) != expected):
        missing, twice = len(expected - set(keys)), len(keys) - len(set(keys))
        raise RuntimeError(f"sentences not scored: {missing}, scored twice: {twice}")
    return sorted(joined, key=lambda score: score.key)
