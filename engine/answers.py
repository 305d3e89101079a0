"""Questions to a trained model by several people: one at a time, and what was used last is kept."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import cv2
import numpy as np

from engine.predictor import EncodedImage, Prediction, Predictor, check_sentence
from utils.photos import read_photo

SHOWN_SIDE = 1280  # pixels; what people see and what is kept of a photo is no larger
PHOTOS, MAPS = 16, 32  # kept in memory, of all people together; at most some 0.5 GB

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Seen:
    """A photo that was encoded.

    pixels: (H, W, 3) uint8 RGB, no side longer than `SHOWN_SIDE`.
    encoded: its features, from all its pixels; predictions come at the size of `pixels`.
    size: (height, width) that it came with.
    """

    pixels: np.ndarray
    encoded: EncodedImage
    size: tuple[int, int]


class Answer(NamedTuple):
    """A prediction with what it took, in seconds; None: it was there already."""

    seen: Seen
    found: Prediction
    encoding: float | None
    answering: float | None


class Answers:
    """Asks the model, one question at a time, and keeps what was used last.

    Photos are known by the path that they were uploaded to. It holds a digest of the file, which
    only those know who have the file: nobody is given anybody else's.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._found: OrderedDict[tuple[str, str], Prediction] = OrderedDict()
        self._lock = threading.Lock()

    def look(self, path: str) -> tuple[Seen, float | None]:
        """Encode a photo, unless it was lately; and how many seconds that took, or None.

        Raises:
            UserError: it cannot be read.
        """
        with self._lock:
            return _recall(self._seen, path, lambda: self._encode(path), PHOTOS)

    def ask(self, path: str, sentence: str) -> Answer:
        """Segment what a sentence denotes in a photo, which is encoded once.

        Raises:
            UserError: the photo cannot be read, or the sentence is none.
        """
        check_sentence(sentence)  # the photo is not looked at in vain
        seen, encoding = self.look(path)
        with self._lock:
            found, answering = _recall(
                self._found,
                (path, sentence),
                lambda: self.predictor(seen.encoded, sentence)[0],
                MAPS,
            )
        return Answer(seen, found, encoding, answering)

    def _encode(self, path: str) -> Seen:
        photo = read_photo(path, self.predictor.max_pixels)
        encoded = self.predictor.encode(photo)
        encoded.features.v5.flatten()[0].item()  # a GPU is waited for, so that the time is true
        size = photo.shape[:2]
        scale = SHOWN_SIDE / max(size)
        if scale < 1:
            height, width = (max(1, round(side * scale)) for side in size)
            photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
        return Seen(photo, replace(encoded, size=photo.shape[:2]), size)


def _recall(
    kept: OrderedDict[Hashable, T], key: Hashable, make: Callable[[], T], limit: int
) -> tuple[T, float | None]:
    """What lies under a key, made if it is not there; what was used longest ago gives way."""
    seconds = None
    if key not in kept:
        start = time.perf_counter()
        kept[key] = make()
        seconds = time.perf_counter() - start
    kept.move_to_end(key)
    while len(kept) > limit:
        kept.popitem(last=False)
    return kept[key], seconds
