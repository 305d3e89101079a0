"""What the model makes of a sentence, as a picture; and of the same few after each validation."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from engine.evaluator import SentenceScore
from engine.run import PICTURES, Run
from utils.dataset import EvaluationDataset
from utils.transforms import decode_image, load_mask
from utils.visualize import comparison, save_picture


def draw_sentence(dataset: EvaluationDataset, score: SentenceScore) -> Image.Image:
    """Photo, ground truth and prediction under the sentence and its IoU.

    Args:
        dataset: that was scored.
        score: of one of its sentences, with `pred_rle`.
    """
    ref = dataset.mask_source(score.key)
    image = decode_image(dataset.reader.image(ref.image_key), ref.image_key)
    rle = {"size": [score.height, score.width], "counts": score.pred_rle}
    pred_mask = coco_mask.decode(rle) > 0
    return comparison(image, load_mask(ref) > 0, pred_mask, score.sentence, score.iou)


def watched_sentences(dataset: EvaluationDataset, count: int) -> set[tuple[int, int]]:
    """The keys of up to `count` sentences, each on another image, spread evenly over the split.

    They depend on the records alone, so all ranks and all epochs agree on them.
    """
    images = len(dataset.groups)
    count = min(count, images)
    chosen = (dataset.groups[i * images // count] for i in range(count))
    # Not always the first ref of an image: others are described differently.
    return {(group[i % len(group)], 0) for i, group in enumerate(chosen)}


def show_sentences(run: Run, scores: Sequence[SentenceScore]) -> None:
    """Draw scored sentences into `pictures/epoch_<epoch>.jpg`, and give them to the tracker."""
    if not scores:
        return
    epoch, dataset = run.epoch + 1, run.val_loader.dataset
    pictures = [draw_sentence(dataset, score) for score in scores]
    captions = [f"{score.sentence} (IoU {score.iou:.2f})" for score in scores]
    run.tracker.show(epoch, list(zip(captions, pictures, strict=True)))
    picture = Image.fromarray(np.vstack(pictures))  # all have one width
    save_picture(picture, run.folder / PICTURES / f"epoch_{epoch:04d}.jpg")
