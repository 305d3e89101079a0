"""Photos and masks in the network's square, made once and kept in a memory-mapped file.

Sound because no augmentation changes them. S is the side of the network's input. The file:

    header  4096 bytes: JSON padded with blanks; what the rest was made from (`_identity`)
    images  (images, S, S, 3) uint8 RGB, each once, in the order of their first refs
    masks   (refs, S, S) uint8, in the order of the LMDB
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from loguru import logger

from utils.errors import UserError
from utils.files import atomic_path
from utils.lock import hold
from utils.machine import available_cores
from utils.records import RecordReader, group_positions
from utils.transforms import load_image, load_square_mask

CACHE_VERSION = 2
_HEADER = 4096


class SquareCache:
    """Reads a cache; maps it at the first use, in whichever process that is.

    Only names and what the file must say of itself travel to another process.

    Args:
        path: from `open_cache`.
        identity: what its header has to say.
        reader: the records that it was made from.
    """

    def __init__(self, path: Path, identity: dict, reader: RecordReader) -> None:
        self.path = path
        self.identity = identity
        self.reader = reader

    def __getstate__(self) -> dict:
        return {"path": self.path, "identity": self.identity, "reader": self.reader}

    def image(self, position: int) -> np.ndarray:
        """Copy the photo of the ref at `position`: (S, S, 3) uint8 RGB."""
        images, _ = self._squares
        return np.array(images[self._rows[position]])

    def mask(self, position: int) -> np.ndarray:
        """Copy its mask: (S, S) uint8."""
        _, masks = self._squares
        return np.array(masks[position])

    @cached_property
    def _squares(self) -> tuple[np.ndarray, np.ndarray]:
        fault = _fault(self.path, self.identity)
        if fault is not None:
            raise UserError(f"{self.path} was replaced while it was in use ({fault}); start again")
        return _map(self.path, self.identity, "r")

    @cached_property
    def _rows(self) -> dict[int, int]:
        """Tell by a ref's position which image is its own."""
        groups = enumerate(group_positions(self.reader.index.image_keys))
        return {position: row for row, positions in groups for position in positions}


def open_cache(
    folder: str | Path,
    reader: RecordReader,
    side: int,
    progress: Callable[[Iterable, int, str], Iterable],
) -> SquareCache:
    """Return the cache of an LMDB file, made now if it is not there or does not fit any more.

    Any number of processes may ask for it at once: one makes it, the others wait.

    Args:
        folder: of caches; created.
        reader: the records.
        side: S.
        progress: wraps (iterable, length, description) to show how far the work is.
    Raises:
        UserError: `folder` is a file.
        OSError: its disk has no room.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"DATA.cache {folder} is a file: give a folder, or null for no cache")
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(reader, side)
    source = Path(identity["LMDB"])
    place = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    path = folder / f"{source.parent.name}-{reader.path.stem}-{side}-{place}.squares"
    cache = SquareCache(path, identity, reader)

    def say_waiting() -> None:
        logger.info(f"waiting for another process with {path}")

    with hold(path.with_suffix(".lock"), say_waiting):
        fault = _fault(path, identity) or _spot_check(cache)
        if fault is not None:
            logger.info(
                f"DATA.cache: making {path} ({fault}), {_size(identity) / 1e9:.2f} GB for "
                f"{identity['images']:,} images and {identity['refs']:,} masks"
            )
            path.unlink(missing_ok=True)  # of no use to anyone, and its room may be needed
            _make(cache, progress)
    return SquareCache(path, identity, reader)  # the spot check mapped a file that may be gone


def _identity(reader: RecordReader, side: int) -> dict:
    """Return all that the content of a cache depends on, and its sizes."""
    return {
        "cache version": CACHE_VERSION,
        "side": side,
        "OpenCV": cv2.__version__,
        "LMDB": str(reader.path.resolve()),
        "LMDB's date": reader.path.stat().st_mtime_ns,
        "LMDB's index": reader.digest(),
        "refs": len(reader),
        "images": reader.meta["images"],
    }


def _size(identity: dict) -> int:
    """Return the bytes of the whole file."""
    return _HEADER + (3 * identity["images"] + identity["refs"]) * identity["side"] ** 2


def _map(path: Path, identity: dict, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Map the images and the masks."""
    refs, side = identity["refs"], identity["side"]
    images = np.memmap(path, np.uint8, mode, _HEADER, (identity["images"], side, side, 3))
    return images, np.memmap(path, np.uint8, mode, _HEADER + images.size, (refs, side, side))


def _fault(path: Path, identity: dict) -> str | None:
    """Tell why the file cannot serve, by what it says of itself and its length; None if it can."""
    if not path.is_file():
        return "there is none yet"
    with path.open("rb") as file:
        head = file.read(_HEADER)
    try:
        made_from = dict(json.loads(head))
    except (ValueError, TypeError):
        return "the old one is unfinished or damaged"
    changed = [key for key, value in identity.items() if made_from.get(key) != value]
    if changed:
        return f"the old one is of another {', '.join(changed)}"
    size, expected = path.stat().st_size, _size(identity)
    return None if size == expected else f"the old one has {size} bytes of {expected}"


def _spot_check(cache: SquareCache) -> str | None:
    """Make the first, middle and last ref's photo and mask anew: do they equal the file's?"""
    reader, side = cache.reader, cache.identity["side"]
    for position in sorted({0, len(reader) // 2, len(reader) - 1}):
        ref = reader.ref(position)
        same_image = np.array_equal(cache.image(position), load_image(reader, ref, side))
        if not (same_image and np.array_equal(cache.mask(position), load_square_mask(ref, side))):
            return f"the old one has other pixels for ref {ref.ref_id}"
    return None


def _make(cache: SquareCache, progress: Callable[[Iterable, int, str], Iterable]) -> None:
    """Fill a new file in threads (OpenCV leaves Python's lock), its header last."""
    path, identity, reader = cache.path, cache.identity, cache.reader
    groups = group_positions(reader.index.image_keys)
    with atomic_path(path) as partial:
        with partial.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk would kill who writes to a map
                os.posix_fallocate(file.fileno(), 0, _size(identity))
            else:
                file.truncate(_size(identity))
        images, masks = _map(partial, identity, "r+")

        def fill(row: int) -> None:
            refs = [reader.ref(position) for position in groups[row]]
            images[row] = load_image(reader, refs[0], identity["side"])
            for position, ref in zip(groups[row], refs, strict=True):
                masks[position] = load_square_mask(ref, identity["side"])

        with ThreadPoolExecutor(available_cores()) as pool:
            rows = pool.map(fill, range(len(groups)))
            for _ in progress(rows, len(groups), f"cache {path.name}"):
                pass
        images.flush()
        masks.flush()
        with partial.open("r+b") as file:
            file.write(json.dumps(identity).encode().ljust(_HEADER))
            file.flush()
            os.fsync(file.fileno())
