"""Photos and masks in the network's square, made once and kept in a memory-mapped file.

Sound because no augmentation changes them. S is the side of the network's input. The file holds a
header of 4096 bytes (JSON padded with blanks: what the rest was made from), then the photos in the
order of their first refs, (S, S, 3) uint8 RGB each, then the refs' masks, (S, S) uint8 each.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from loguru import logger
from tqdm import tqdm

from utils.errors import UserError
from utils.files import atomic_path
from utils.lock import hold
from utils.machine import available_cores
from utils.records import RecordReader, group_positions
from utils.transforms import load_image, load_square_mask

CACHE_VERSION = 4
AT_A_TIME = 64  # photos that are in memory while the file is made
_HEADER = 4096


class SquareCache:
    """Reads the cache of a reader's records; maps it at the first use, in whichever process."""

    def __init__(self, path: Path, reader: RecordReader, side: int) -> None:
        self.path = path
        self.reader = reader
        self.side = side
        self.size = _HEADER + (3 * reader.meta["images"] + len(reader)) * side**2  # bytes
        made_from = {
            "cache version": CACHE_VERSION,
            "side": side,
            "OpenCV": cv2.__version__,
            "LMDB's date": reader.path.stat().st_mtime_ns,
            "LMDB's digest": reader.digest(),
        }
        self.header = json.dumps(made_from).encode()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def is_whole(self) -> bool:
        """Tell by its header and length whether the file is there and of these records."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            return False
        with self.path.open("rb") as file:
            return file.read(_HEADER).rstrip() == self.header

    def is_sound(self) -> bool:
        """Make the first and last ref's photo and mask anew: do they equal the file's?"""
        return all(
            np.array_equal(self.image(position), self._make_image(position))
            and np.array_equal(self.mask(position), self._make_mask(position))
            for position in (0, len(self.reader) - 1)
        )

    def image(self, position: int) -> np.ndarray:
        """Copy the photo of the ref at `position`: (S, S, 3) uint8 RGB."""
        photos, _ = self._arrays
        return np.array(photos[self._photo_of[position]])

    def mask(self, position: int) -> np.ndarray:
        """Copy its mask: (S, S) uint8."""
        _, masks = self._arrays
        return np.array(masks[position])

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Map the file's photos, (images, S, S, 3) uint8, and masks, (refs, S, S) uint8."""
        if not self.is_whole():
            raise UserError(f"{self.path} was replaced while it was in use: start again")
        squares = np.memmap(self.path, np.uint8, "r", _HEADER).reshape(-1, self.side, self.side)
        photos, masks = np.split(squares, [-len(self.reader)])
        return photos.reshape(-1, self.side, self.side, 3), masks

    @cached_property
    def _photo_of(self) -> dict[int, int]:
        """Tell by a ref's position which photo of the file it is on."""
        groups = enumerate(group_positions(self.reader.index.image_keys))
        return {position: photo for photo, positions in groups for position in positions}

    def _make_image(self, position: int) -> np.ndarray:
        return load_image(self.reader, self.reader.ref(position), self.side)

    def _make_mask(self, position: int) -> np.ndarray:
        return load_square_mask(self.reader.ref(position), self.side)

    def make(self) -> None:
        """Write the file; images are read in threads (OpenCV leaves Python's lock)."""
        groups = group_positions(self.reader.index.image_keys)
        squares = [(self._make_image, group[0]) for group in groups]
        squares += [(self._make_mask, position) for position in range(len(self.reader))]
        with (
            atomic_path(self.path) as partial,
            partial.open("wb") as file,
            ThreadPoolExecutor(available_cores()) as pool,
        ):
            file.write(self.header.ljust(_HEADER))
            bar = {"desc": f"cache {self.path.name}", "disable": None, "leave": False}
            for start in tqdm(range(0, len(squares), AT_A_TIME), **bar):
                some = squares[start : start + AT_A_TIME]
                file.writelines(pool.map(lambda square: square[0](square[1]), some))
            file.flush()
            os.fsync(file.fileno())


def open_cache(folder: str | Path, reader: RecordReader, side: int) -> SquareCache:
    """Return the cache of an LMDB file, made now if it is not there or does not fit any more.

    Any number of processes may ask for it at once: one makes it, the others wait.

    Args:
        folder: of caches; created.
    Raises:
        UserError: `folder` is a file.
        OSError: its disk has no room.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"DATA.cache {folder} is a file: give a folder, or null for no cache")
    folder.mkdir(parents=True, exist_ok=True)
    source = reader.path.resolve()
    place = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    path = folder / f"{source.parent.name}-{reader.path.stem}-{side}-{place}.squares"
    cache = SquareCache(path, reader, side)
    waiting = f"waiting for another process with {path}"
    with hold(path.with_suffix(".lock"), lambda: logger.info(waiting)):
        if not (cache.is_whole() and cache.is_sound()):
            how = "making anew" if path.exists() else "making"
            logger.info(f"DATA.cache: {how} {path}, {cache.size / 1e9:.2f} GB")
            path.unlink(missing_ok=True)  # of no use to anyone, and its room may be needed
            cache.make()
    return SquareCache(path, reader, side)  # `cache` may have mapped the file that went
