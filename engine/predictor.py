"""A trained model on anybody's photos: what a sentence denotes, as a mask of the photo's size.

    predictor = Predictor("config/refshapes/cris_tiny.yaml", "best_model.pth")
    for found in predictor("photo.jpg", ["the red star", "circle on the far left"]):
        print(found.sentence, found.area, found.box, found.mean_probability)

A photo goes through the letterbox of training, and the network's map through the evaluator's way
back, so a mask here is the one that test.py scores.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.build import find_device, restore_trained
from engine.evaluator import probability_maps, validation_protocol
from engine.loaders import images_at_a_time
from model.fold import fold_batch_norm
from model.neck import ImageFeatures
from utils.config import Config, load_config
from utils.errors import UserError
from utils.photos import MAX_PIXELS, Photo, read_photo
from utils.tokenizer import has_words, token_lengths, tokenize
from utils.transforms import letterbox_image, normalize_images, restore_size

MAX_CHARACTERS = 10_000  # of a sentence; a few dozen are what the network reads of it


@dataclass(frozen=True, eq=False)
class Prediction:
    """Hold what the model makes of one sentence, at the photo's size (H, W).

    probability: (H, W) float32 in [0, 1].
    mask: (H, W) bool, where the probability is above the threshold.
    area: pixels of the mask.
    box: around the mask, (x1, y1, x2, y2) in pixels, x2 and y2 just outside; None if it is empty.
    mean_probability: in the mask; None if it is empty.
    is_cut: the sentence has more tokens than `TRAIN.word_len`, and the rest was not read.
    """

    sentence: str
    probability: np.ndarray
    threshold: float
    mask: np.ndarray
    area: int
    box: tuple[int, int, int, int] | None
    mean_probability: float | None
    is_cut: bool

    def at(self, threshold: float) -> "Prediction":
        """Apply another threshold, in (0, 1), to the same probabilities; the model is not run."""
        return _prediction(self.sentence, self.probability, threshold, self.is_cut)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """Keep all that a photo gives before a sentence is known, to be kept for more sentences.

    features: of this one image, on the predictor's device.
    size: (height, width) of the photo, its orientation followed.
    """

    features: ImageFeatures
    size: tuple[int, int]


class Predictor:
    """Segments photos by sentences: `predictor(photo, ["the man on the left"])`.

    A photo is a path, an array or a Pillow image, as `utils.photos.read_photo` takes them, or what
    `encode` made of one.
    """

    def __init__(
        self,
        config: str | Path | Config,
        weights: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """
        Args:
            config: of the model; `TEST.protocol` and `TEST.threshold` decide what is foreground
                (of `both`, aligned). A path is read without `--opts`.
            weights: its checkpoint; None: `TEST.weights`, or else the best one of the run.
            device: where to compute; None: the first GPU, if there is one.
            max_pixels: of a photo; larger ones are refused before they are decoded.
        Raises:
            UserError: config or weights cannot be read, or do not belong together; or the device
                is not there.
        """
        self.config = config if isinstance(config, Config) else load_config(config)
        self.device = find_device(device, "device")
        weights = None if weights is None else str(weights)
        model, self.weights = restore_trained(self.config, self.device, weights, "weights")
        self.model = fold_batch_norm(model)
        self.max_pixels = max_pixels
        self.protocols = validation_protocol(self.config)
        ((self.protocol, protocol),) = self.protocols.items()
        self.threshold = protocol.threshold

    def __call__(
        self, image: Photo | EncodedImage, sentences: str | Sequence[str]
    ) -> list[Prediction]:
        """Segment what each sentence denotes in one photo, which is encoded once.

        Raises:
            UserError: the photo cannot be read, or a sentence is none (see `check_sentence`).
        """
        return self.predict([image], [sentences])[0]

    def predict(
        self,
        images: Sequence[Photo | EncodedImage],
        sentences: Sequence[str | Sequence[str]],
    ) -> list[list[Prediction]]:
        """Segment several photos, each with its own sentences, in shared batches.

        Args:
            images: N photos, encoded together; those that are encoded already are used as they are.
            sentences: N lists.
        Returns:
            A list a photo, of a prediction a sentence. All of them are in memory: an area's
            5 bytes a pixel and sentence.
        Raises:
            UserError: a photo cannot be read, or a sentence is none; nothing was computed.
        """
        asked = [_listed(texts) for texts in sentences]
        if len(images) != len(asked):
            raise ValueError(f"{len(images)} images with {len(asked)} lists of sentences")
        flat = [check_sentence(sentence) for texts in asked for sentence in texts]
        if not flat:
            return [[] for _ in asked]
        encoded = self._encoded(images)
        rows = [row for row, texts in enumerate(asked) for _ in texts]
        maps = self._maps(encoded, rows, flat)
        lengths = token_lengths(flat)
        limit = self.config.TRAIN.word_len
        found: list[list[Prediction]] = [[] for _ in asked]
        for row, sentence, square, length in zip(rows, flat, maps, lengths, strict=True):
            probability = restore_size(square, encoded[row].size)
            probability.clip(0, 1, out=probability)  # the cubic ways leave it a little
            found[row].append(_prediction(sentence, probability, self.threshold, length > limit))
        return found

    def encode(self, image: Photo) -> EncodedImage:
        """Compute what a photo gives without a sentence; most of the work for a photo.

        Raises:
            UserError: the photo cannot be read.
        """
        return self.encode_batch([image])[0]

    def encode_batch(self, images: Sequence[Photo]) -> list[EncodedImage]:
        """`encode` for several photos, as many of them at a time as in evaluation."""
        count = images_at_a_time(self.config.TRAIN.batch_size_val, self.device)
        starts = range(0, len(images), count)
        return [row for start in starts for row in self._encode(images[start : start + count])]

    @torch.inference_mode()
    def _encode(self, images: Sequence[Photo]) -> list[EncodedImage]:
        side = self.config.TRAIN.input_size
        squares, sizes = [], []
        for image in images:
            photo = read_photo(image, self.max_pixels)
            squares.append(torch.from_numpy(letterbox_image(photo, side)))
            sizes.append(photo.shape[:2])
        batch = torch.stack(squares).to(self.device)
        features = self.model.encode_image(normalize_images(batch))
        # Copies, or each kept image would keep its whole batch.
        rows = torch.arange(len(sizes), device=self.device)[:, None]
        return [
            EncodedImage(features.repeat(row), size) for row, size in zip(rows, sizes, strict=True)
        ]

    def _encoded(self, images: Sequence[Photo | EncodedImage]) -> list[EncodedImage]:
        raw = [image for image in images if not isinstance(image, EncodedImage)]
        fresh = iter(self.encode_batch(raw) if raw else ())
        return [image if isinstance(image, EncodedImage) else next(fresh) for image in images]

    def _maps(
        self, encoded: Sequence[EncodedImage], rows: Sequence[int], sentences: Sequence[str]
    ) -> Iterable[np.ndarray]:
        """A (S, S) float32 map a sentence."""
        levels = zip(*(image.features for image in encoded), strict=True)
        features = ImageFeatures(*map(torch.cat, levels))
        parts = probability_maps(
            self.model,
            features,
            torch.tensor(rows, device=self.device),
            tokenize(sentences, self.config.TRAIN.word_len).to(self.device),
            self.config.TRAIN.input_size,
            self.protocols,
            self.config.TRAIN.batch_size_val,
        )
        for _, squares in parts:
            yield from squares[self.protocol]


def check_sentence(sentence: str) -> str:
    """Give a sentence back that the model can read.

    Raises:
        UserError: it has no words, is no valid text, or is longer than any sentence.
    """
    if not isinstance(sentence, str):
        raise UserError(f"a sentence is text, not {type(sentence).__name__}")
    if len(sentence) > MAX_CHARACTERS:
        raise UserError(
            f"the sentence has {len(sentence):,} characters: give at most {MAX_CHARACTERS:,}"
        )
    try:
        sentence.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the sentence {sentence[:80]!a} is no valid text: type it in UTF-8"
        ) from None
    if not has_words(sentence):
        raise UserError(f"the sentence {sentence[:80]!r} has no words: say what to look for")
    return sentence


def _listed(sentences: str | Sequence[str]) -> list[str]:
    """One sentence or several as a list; so is what is neither, for `check_sentence` to name."""
    is_one = isinstance(sentences, str) or not isinstance(sentences, Iterable)
    return [sentences] if is_one else list(sentences)


def _prediction(
    sentence: str, probability: np.ndarray, threshold: float, is_cut: bool
) -> Prediction:
    """Measure what is above the threshold in a (H, W) float32 map."""
    mask = probability > threshold
    area = int(np.count_nonzero(mask))
    box = mean = None
    if area:
        ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
        mean = float(probability[mask].mean(dtype=np.float64))
    return Prediction(sentence, probability, threshold, mask, area, box, mean, is_cut)
