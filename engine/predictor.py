"""Find what a sentence denotes in anybody's photo, as a mask of the photo's size.

    predictor = Predictor("config/refshapes/cris_tiny.yaml", "best_model.pth")
    for found in predictor("photo.jpg", ["the red star", "circle on the far left"]):
        print(found.sentence, found.area, found.box, found.mean_probability)

A photo goes through the letterbox of training, and the network's map through the evaluator's way
back, so a mask here is the one that test.py scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
from utils.photos import Photo, read_photo
from utils.tokenizer import has_words, token_lengths, tokenize
from utils.transforms import letterbox_image, normalize_images, restore_size

MAX_CHARACTERS = 10_000  # of a sentence; a few dozen are what the network reads of it


@dataclass(frozen=True, eq=False)
class Prediction:
    """Hold what the model makes of one sentence, at the photo's size (H, W).

    probability: (H, W) float32 in [0, 1].
    is_cut: the sentence has more tokens than `TRAIN.word_len`, and the rest was not read.
    no_target_pixels: a mask of fewer pixels is emptied: nothing is found.
    """

    sentence: str
    probability: np.ndarray
    threshold: float
    is_cut: bool
    no_target_pixels: int = 1

    def at(self, threshold: float) -> "Prediction":
        """Apply another threshold, in (0, 1), to the same probabilities; the model is not run."""
        return replace(self, threshold=threshold)

    @cached_property
    def mask(self) -> np.ndarray:
        """Tell where the probability is above the threshold, (H, W) bool, if in enough pixels."""
        above = self.probability > self.threshold
        return above & (np.count_nonzero(above) >= self.no_target_pixels)

    @cached_property
    def area(self) -> int:
        """Count the pixels of the mask."""
        return int(np.count_nonzero(self.mask))

    @cached_property
    def box(self) -> tuple[int, int, int, int] | None:
        """Return the mask's (x1, y1, x2, y2) in pixels, x2 and y2 just outside; None if empty."""
        if self.area == 0:
            return None
        ys, xs = (np.flatnonzero(self.mask.any(axis=axis)).tolist() for axis in (1, 0))
        return xs[0], ys[0], xs[-1] + 1, ys[-1] + 1

    @cached_property
    def mean_probability(self) -> float | None:
        """Return the mean probability in the mask; None if it is empty."""
        return float(self.probability[self.mask].mean(dtype=np.float64)) if self.area else None


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """Keep what a photo gives before a sentence is known.

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
    ) -> None:
        """
        Args:
            config: of the model; `TEST.protocol` and `TEST.threshold` decide what is foreground
                (of `both`, aligned). A path is read without `--opts`.
            weights: its checkpoint; None: `TEST.weights`, or else the best one of the run.
            device: where to compute; None: the first GPU, if there is one.
        Raises:
            UserError: config or weights cannot be read, or do not belong together; or the device
                is not there.
        """
        self.config = config if isinstance(config, Config) else load_config(config)
        self.device = find_device(device, "device")
        model, self.weights, state = restore_trained(self.config, self.device, weights, "weights")
        self.model = fold_batch_norm(model)
        self.protocols = validation_protocol(self.config.TEST)
        ((self.protocol, protocol),) = self.protocols.items()
        self.threshold = protocol.threshold
        # Who has never seen a sentence about nothing does not say "nothing" by a small mask.
        self.no_target_pixels = protocol.no_target_pixels if state.get("no_target") else 1

    def __call__(
        self, image: Photo | EncodedImage, sentences: str | Sequence[str]
    ) -> list[Prediction]:
        """Segment what each sentence denotes in one photo, which is encoded once.

        Raises:
            UserError: the photo cannot be read, or a sentence is none (see `check_sentence`).
        """
        return self.predict([image], [sentences])[0]

    def predict(
        self, images: Sequence[Photo | EncodedImage], sentences: Sequence[str | Sequence[str]]
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
        asked = [[texts] if isinstance(texts, str) else list(texts) for texts in sentences]
        if len(images) != len(asked):
            raise ValueError(f"{len(images)} images with {len(asked)} lists of sentences")
        flat = [check_sentence(sentence) for texts in asked for sentence in texts]
        found: list[list[Prediction]] = [[] for _ in asked]
        if not flat:
            return found
        fresh = iter(self.encode_batch([i for i in images if not isinstance(i, EncodedImage)]))
        encoded = [i if isinstance(i, EncodedImage) else next(fresh) for i in images]
        levels = zip(*(image.features for image in encoded), strict=True)
        rows = [row for row, texts in enumerate(asked) for _ in texts]
        train = self.config.TRAIN
        parts = probability_maps(
            self.model,
            ImageFeatures(*map(torch.cat, levels)),
            torch.tensor(rows, device=self.device),
            tokenize(flat, train.word_len).to(self.device),
            train.input_size,
            self.protocols,
            train.batch_size_val,
        )
        squares = (square for _, maps in parts for square in maps()[self.protocol])
        lengths = token_lengths(flat)
        for row, sentence, square, length in zip(rows, flat, squares, lengths, strict=True):
            probability = restore_size(square, encoded[row].size)
            probability.clip(0, 1, out=probability)  # the cubic ways leave it a little
            rule = self.threshold, length > train.word_len, self.no_target_pixels
            found[row].append(Prediction(sentence, probability, *rule))
        return found

    def encode(self, image: Photo) -> EncodedImage:
        """Compute what a photo gives without a sentence; most of the work for a photo."""
        return self.encode_batch([image])[0]

    @torch.inference_mode()
    def encode_batch(self, images: Sequence[Photo]) -> list[EncodedImage]:
        """Encode several photos, as many of them at a time as in evaluation."""
        count = images_at_a_time(self.config.TRAIN.batch_size_val, self.device)
        encoded = []
        for start in range(0, len(images), count):
            squares, sizes = [], []
            for image in images[start : start + count]:
                photo = read_photo(image)
                square = letterbox_image(photo, self.config.TRAIN.input_size)
                squares.append(torch.from_numpy(square))
                sizes.append(photo.shape[:2])
            batch = torch.stack(squares).to(self.device)
            features = self.model.encode_image(normalize_images(batch))
            # Copies, or each kept image would keep its whole batch.
            rows = torch.arange(len(sizes), device=self.device)[:, None]
            encoded += map(EncodedImage, map(features.repeat, rows), sizes)
        return encoded


def check_sentence(sentence: str) -> str:
    """Return a sentence that the model can read; raise UserError for another."""
    is_utf8 = sentence.encode("utf-8", "ignore").decode() == sentence
    if len(sentence) > MAX_CHARACTERS or not is_utf8 or not has_words(sentence):
        raise UserError(
            f"the sentence {sentence[:80]!a} cannot be read: say in words what to look for "
            f"(UTF-8, at most {MAX_CHARACTERS:,} characters)"
        )
    return sentence
