"""Read photos as people have them: any usual file, array or Pillow image becomes RGB pixels."""

import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError

MAX_PIXELS = 100_000_000  # of a photo; decoded 0.3 GB, and a probability map of it 0.4 GB more
# What both decoders here know. Pillow is asked for no other: some of its readers start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
HIGH_BYTE_MODES = ("I;16", "I;16L", "I;16B", "I;16N")

Photo = str | Path | np.ndarray | Image.Image


def decode(data: bytes, flags: int, name: str, remedy: str) -> np.ndarray:
    """Return the pixels of an image file, (H, W) or (H, W, channels), as cv2's `flags` say.

    An EXIF orientation is followed unless the flags forbid it, as in the release.

    Args:
        name, remedy: for the error.
    Raises:
        UserError: it is empty, cut off or no image.
    """
    if not data:
        raise UserError(f"{name} is an empty file: {remedy}")
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise UserError(
            f"{name} cannot be decoded ({len(data)} bytes; cut off or no image): {remedy}"
        )
    return pixels


def read_photo(photo: Photo) -> np.ndarray:
    """Turn what a person has into the pixels that a person sees.

    A file without transparency is decoded exactly as for training. An EXIF orientation is
    followed, 16 bits keep their upper 8, grey becomes RGB, and what is transparent becomes white.

    Args:
        photo: path of a JPEG, PNG, WebP, TIFF, BMP, GIF (its first picture) or AVIF; or a Pillow
            image; or uint8 or uint16 pixels, (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA.
    Returns:
        (H, W, 3) uint8 RGB.
    Raises:
        UserError: it cannot be read, or has more than MAX_PIXELS, by its head.
    """
    if isinstance(photo, str | Path):
        return _read_file(Path(photo))
    if isinstance(photo, np.ndarray):
        return _from_array(photo)
    if not isinstance(photo, Image.Image):
        raise UserError(f"a photo is a path, a numpy array or a Pillow image, not {type(photo)}")
    _check_size(photo.size, "the picture")
    try:
        return _from_pillow(photo, "the picture")
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # opened, but not read to its end yet
        raise UserError(f"the picture cannot be decoded as RGB ({error})") from None


def _read_file(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: there is no such image file")
    size = path.stat().st_size
    remedy = f"give a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} that other programs can open"
    if size == 0:
        raise UserError(f"{path} is an empty file: {remedy}")
    try:
        # Large pictures are refused below, in one line, and not warned of in several.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            _check_size(image.size, str(path))
            if image.has_transparency_data:
                return _from_pillow(image, str(path))
    except (UserError, PermissionError):
        raise
    except Image.DecompressionBombError as error:  # far above our limit
        raise UserError(f"{path} is too large to be read: {error}") from None
    except Exception as error:  # a parser can stumble over foreign bytes in any way
        raise UserError(
            f"{path} cannot be read as an image ({size} bytes; {type(error).__name__}): {remedy}"
        ) from None
    return decode(path.read_bytes(), cv2.IMREAD_COLOR_RGB, str(path), remedy)


def _from_array(pixels: np.ndarray) -> np.ndarray:
    shape = pixels.shape[:2] if pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4) else pixels.shape
    if len(shape) != 2 or 0 in shape or pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"an array of {pixels.dtype} and shape {pixels.shape} is no photo: give uint8 or "
            "uint16, (H, W), (H, W, 3) or (H, W, 4), in the order RGB"
        )
    _check_size(shape[::-1], "the array")
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.size == shape[0] * shape[1]:
        return np.repeat(pixels.reshape(*shape, 1), 3, axis=2)
    if pixels.shape[2] == 4:
        return _on_white(Image.fromarray(np.ascontiguousarray(pixels)))
    return np.ascontiguousarray(pixels)


def _from_pillow(image: Image.Image, name: str) -> np.ndarray:
    if image.mode in ("F", "I"):
        raise UserError(f"{name} has pixels of mode {image.mode}: save it with 8 or 16 bits each")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"))
    if image.mode in HIGH_BYTE_MODES:
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _on_white(image: Image.Image) -> np.ndarray:
    """Turn RGBA into (H, W, 3) uint8, as it looks on a white page."""
    page = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(page, image).convert("RGB"))


def _check_size(size: tuple[int, int], name: str) -> None:
    """Refuse a (width, height) that is too large."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name}, {width}×{height}, has {width * height / 1e6:.1f} million pixels, at most "
            f"{MAX_PIXELS / 1e6:g} million are read: make it smaller"
        )
