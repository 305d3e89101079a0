"""What the model makes of a sentence, as a picture; and of the same few after each validation."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from engine.evaluator import SentenceScore
from engine.run import PICTURES, Run
from utils.dataset import EvaluationDataset
from utils.records import RecordReader, RefRecord
from utils.transforms import decode_image, load_mask
from utils.visualize import comparison, save_picture


def draw_sentence(reader: RecordReader, ref: RefRecord, line: Mapping) -> Image.Image:
    """Photo, ground truth and prediction under the sentence and its IoU.

    Args:
        ref: whose mask the sentence was scored against.
        line: of the sentence in the `.jsonl`.
    """
    image = decode_image(reader.image(ref.image_key), ref.image_key)
    masks = load_mask(ref) > 0, coco_mask.decode(line["pred_rle"]) > 0
    return comparison(image, *masks, line["sentence"], line["iou"])


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
    lines = [(dataset.mask_source(score.key), score.record()) for score in scores]
    pictures = [draw_sentence(dataset.reader, *line) for line in lines]
    captions = [f"{score.sentence} (IoU {score.iou:.2f})" for score in scores]
    run.tracker.show(epoch, list(zip(captions, pictures, strict=True)))
    picture = Image.fromarray(np.vstack(pictures))  # all have one width
    save_picture(picture, run.folder / PICTURES / f"epoch_{epoch:04d}.jpg")
