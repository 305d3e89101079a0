"""Photos and masks in the network's square, made once and kept in a memory-mapped file.

Sound because no augmentation changes them. S is the side of the network's input. The file:

    header  4096 bytes: JSON padded with blanks; what the rest was made from (`_identity`)
    rows    int32 a ref: which image is its own; padded to 4096 bytes
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
from typing import NamedTuple

import cv2
import numpy as np

from utils.errors import UserError
from utils.files import atomic_path, remove_leftovers
from utils.lock import hold
from utils.machine import available_cores
from utils.records import RecordReader, RefRecord

CACHE_VERSION = 1
_PAGE = 4096


class SquareMaker(NamedTuple):
    """Hold the functions that a cache spares: they bring photo and mask into the square."""

    side: int
    image: Callable[[RecordReader, RefRecord], np.ndarray]  # -> (S, S, 3) uint8
    mask: Callable[[RefRecord], np.ndarray]  # -> (S, S) uint8


class SquareCache:
    """Reads a cache; maps it at the first use, in whichever process that is.

    Only the path and what the file must say of itself travel to another process.

    Args:
        path: from `open_cache`.
        identity: what its header has to say.
    """

    def __init__(self, path: Path, identity: dict) -> None:
        self.path = path
        self.identity = identity

    def __getstate__(self) -> dict:
        return {"path": self.path, "identity": self.identity}

    def image(self, position: int) -> np.ndarray:
        """A copy of the photo of the ref at `position`: (S, S, 3) uint8 RGB."""
        return np.array(self._parts.images[self._parts.rows[position]])

    def mask(self, position: int) -> np.ndarray:
        """A copy of its mask: (S, S) uint8."""
        return np.array(self._parts.masks[position])

    @cached_property
    def _parts(self) -> "_Parts":
        fault = _fault(self.path, self.identity)
        if fault is not None:
            raise UserError(f"{self.path} was replaced while it was in use ({fault}); start again")
        return _map(self.path, self.identity, "r")


def open_cache(
    folder: str | Path,
    reader: RecordReader,
    maker: SquareMaker,
    say: Callable[[str], object],
    progress: Callable[[Iterable, int, str], Iterable],
) -> SquareCache:
    """Return the cache of an LMDB file, made now if it is not there or does not fit any more.

    Any number of processes may ask for it at once: one makes it, the others wait.

    Args:
        folder: of caches; created.
        reader: the records.
        maker: makes what is cached.
        say: takes a line for the person.
        progress: wraps (iterable, length, description) to show how far the work is.
    Raises:
        UserError: `folder` is a file.
        OSError: its disk has no room.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"DATA.cache {folder} is a file: give a folder, or null for no cache")
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(reader, maker.side)
    place = hashlib.sha256(os.fsencode(reader.path.resolve())).hexdigest()[:8]
    name = f"{reader.path.resolve().parent.name}-{reader.path.stem}-{maker.side}-{place}"
    path = folder / f"{name}.squares"
    with hold(folder / f"{name}.lock", lambda: say(f"waiting for another process with {path}")):
        fault = _fault(path, identity) or _spot_check(path, identity, reader, maker)
        if fault is not None:
            size = _ends(identity)[-1]
            say(
                f"DATA.cache: making {path} ({fault}), {size / 1e9:.2f} GB for "
                f"{identity['images']:,} images and {identity['refs']:,} masks"
            )
            remove_leftovers(path)
            path.unlink(missing_ok=True)  # of no use to anyone, and its room may be needed
            _make(path, identity, reader, maker, progress)
    return SquareCache(path, identity)


def _identity(reader: RecordReader, side: int) -> dict:
    """Return all that the content of a cache depends on, and its sizes."""
    stat = reader.path.stat()
    return {
        "cache version": CACHE_VERSION,
        "side": side,
        "OpenCV": cv2.__version__,
        "LMDB": str(reader.path.resolve()),
        "LMDB's size": stat.st_size,
        "LMDB's date": stat.st_mtime_ns,
        "LMDB's index": reader.digest(),
        "refs": len(reader),
        "images": reader.meta["images"],
    }


class _Parts(NamedTuple):
    rows: np.ndarray
    images: np.ndarray
    masks: np.ndarray


def _ends(identity: dict) -> tuple[int, int, int]:
    """Byte offsets at which images begin, masks begin, and the file ends."""
    refs, images, side = identity["refs"], identity["images"], identity["side"]
    images_at = _PAGE + -(-4 * refs // _PAGE) * _PAGE
    masks_at = images_at + images * side * side * 3
    return images_at, masks_at, masks_at + refs * side * side


def _map(path: Path, identity: dict, mode: str) -> _Parts:
    refs, images, side = identity["refs"], identity["images"], identity["side"]
    images_at, masks_at, _ = _ends(identity)
    return _Parts(
        np.memmap(path, np.int32, mode, _PAGE, (refs,)),
        np.memmap(path, np.uint8, mode, images_at, (images, side, side, 3)),
        np.memmap(path, np.uint8, mode, masks_at, (refs, side, side)),
    )


def _fault(path: Path, identity: dict) -> str | None:
    """Why the file cannot serve, or None: what it says of itself and how long it is."""
    if not path.is_file():
        return "there is none yet"
    with path.open("rb") as file:
        head = file.read(_PAGE)
    try:
        made_from = json.loads(head)
    except ValueError:
        return "the old one is unfinished or damaged"
    if not isinstance(made_from, dict):
        return "the old one is damaged"
    changed = [key for key, value in identity.items() if made_from.get(key) != value]
    if changed:
        return f"the old one is of another {', '.join(changed)}"
    size, expected = path.stat().st_size, _ends(identity)[-1]
    return None if size == expected else f"the old one has {size} bytes of {expected}"


def _spot_check(path: Path, identity: dict, reader: RecordReader, maker: SquareMaker) -> str | None:
    """Make the first, middle and last ref's photo and mask anew: do they equal the file's?"""
    cache, count = SquareCache(path, identity), len(reader)
    for position in sorted({0, count // 2, count - 1}):
        ref = reader.ref(position)
        same_image = np.array_equal(cache.image(position), maker.image(reader, ref))
        if not (same_image and np.array_equal(cache.mask(position), maker.mask(ref))):
            return f"the old one has other pixels for ref {ref.ref_id}"
    return None


def _make(
    path: Path,
    identity: dict,
    reader: RecordReader,
    maker: SquareMaker,
    progress: Callable[[Iterable, int, str], Iterable],
) -> None:
    """Fill a new file in threads (OpenCV leaves Python's lock), its header last."""
    groups: dict[str, list[int]] = {}
    for position, key in enumerate(reader.index.image_keys):
        groups.setdefault(key, []).append(position)
    positions = list(groups.values())
    with atomic_path(path) as partial:
        with partial.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk would kill who writes to a map
                os.posix_fallocate(file.fileno(), 0, _ends(identity)[-1])
            else:
                file.truncate(_ends(identity)[-1])
        parts = _map(partial, identity, "r+")

        def fill(row: int) -> None:
            refs = [reader.ref(position) for position in positions[row]]
            parts.images[row] = maker.image(reader, refs[0])
            for position, ref in zip(positions[row], refs, strict=True):
                parts.rows[position] = row
                parts.masks[position] = maker.mask(ref)

        pool = ThreadPoolExecutor(available_cores())
        try:
            rows = pool.map(fill, range(len(positions)))
            for _ in progress(rows, len(positions), f"cache {path.name}"):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        for part in parts:
            part.flush()
        with partial.open("r+b") as file:
            file.write(json.dumps(identity).encode().ljust(_PAGE))
            file.flush()
            os.fsync(file.fileno())
