"""Read photos as people have them: any usual file, array or Pillow image becomes RGB pixels."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import ChunkStream

from utils.errors import UserError

MAX_PIXELS = 100_000_000  # of a photo; decoded 0.3 GB, and a probability map of it 0.4 GB more
# What both decoders here know. Pillow is asked for no other: some of its readers start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
REMEDY = f"give a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} that other programs can open"
PNG_MAGIC, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"

Photo = str | Path | np.ndarray | Image.Image


def decode(data: bytes, flags: int, name: str, remedy: str) -> np.ndarray:
    """Return the pixels of an image file, (H, W) or (H, W, channels), as cv2's `flags` say.

    An EXIF orientation is followed, as in the release.

    Args:
        name, remedy: for the error.
    Raises:
        UserError: it is empty, cut off or no image.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    pixels = None
    with suppress(cv2.error):  # it announces more pixels than OpenCV takes, for one
        if not data.startswith(PNG_MAGIC) or _is_whole_png(data):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise _no_image(data, name, remedy)
    if data[4:8] == b"ftyp":  # AVIF, the one format whose orientation OpenCV does not follow
        with _opened(data, name, remedy) as image:
            turn = image.getexif().get(0x0112, 1)
        pixels = pixels.swapaxes(0, 1) if turn in (5, 6, 7, 8) else pixels
        pixels = pixels[:, ::-1] if turn in (2, 3, 6, 7) else pixels
        pixels = np.ascontiguousarray(pixels[::-1] if turn in (3, 4, 7, 8) else pixels)
    return pixels


def _is_whole_png(data: bytes) -> bool:
    """Check the chunks of a PNG: libpng prints a line about a damaged one that names no file."""
    try:
        ChunkStream(io.BytesIO(data.removeprefix(PNG_MAGIC))).verify()
    except (OSError, SyntaxError):
        return False
    return PNG_END in data


def read_mask(data: bytes, name: str, remedy: str) -> np.ndarray:
    """Read which code a person gave each pixel of a mask: its grey, or a number of its colour.

    A transparent pixel is background and gets 0. Where all others have 0 as well, they are a black
    shape, and get 255; as does the black of a cut-out of several colours, the smaller part of it. A
    palette's code is the index.

    Args:
        data: a PNG; other formats blur a mask.
        name, remedy: for the error.
    Returns:
        (H, W), 0 in the background.
    Raises:
        UserError: it cannot be decoded, or is no PNG.
    """
    pixels = decode(data, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH, name, remedy)
    if not data.startswith(PNG_MAGIC):
        raise UserError(f"{name} is no PNG, and other formats blur a mask: save it as a PNG")
    with _opened(data, name, remedy) as image:
        upright = ImageOps.exif_transpose(image)
        is_shown = np.True_
        if image.has_transparency_data and image.mode.startswith("I;16"):  # Pillow clips them
            is_shown = pixels != image.info["transparency"]
        elif image.has_transparency_data:
            is_shown = np.asarray(upright.convert("RGBA"))[..., 3] > 0
        if image.mode == "P":
            pixels = np.asarray(upright)
    if pixels.ndim == 3:
        is_grey = (pixels == pixels[..., :1]).all(axis=2)
        numbers = pixels @ np.array([1 << 8, 1 << 24, 1 << 40])
        pixels = np.where(is_grey, pixels[..., 0], numbers)
    codes = pixels * is_shown
    if is_shown.all():
        return codes
    shown = codes[is_shown]
    if image.mode in ("LA", "RGBA"):
        is_most = shown.size > np.count_nonzero(shown == 0) > shown.size / 2
        is_drawn_on_black = is_most or np.unique(shown).size == 2
    else:
        is_drawn_on_black = shown.any()
    return codes if is_drawn_on_black else np.where(is_shown & (codes == 0), np.uint8(255), codes)


@contextmanager
def _opened(data: bytes, name: str, remedy: str) -> Iterator[Image.Image]:
    """Open a file with Pillow for what OpenCV does not tell; what fails within is a `UserError`."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it would print what is told here
    try:
        # Large pictures are refused below, in one line, and not warned of in several. Given the
        # path, Pillow would map the file, and with it a turned TIFF the wrong way round.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=FORMATS) as image,
        ):
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:  # far above our limit
        raise UserError(f"{name} is too large to be read: {error}") from None
    except Exception:  # a parser can stumble over foreign bytes in any way
        raise _no_image(data, name, remedy) from None


def _no_image(data: bytes, name: str, remedy: str) -> UserError:
    if not data:
        return UserError(f"{name} is an empty file: {remedy}")
    return UserError(f"{name} cannot be decoded ({len(data)} bytes; cut off or no image): {remedy}")


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
    image = _as_image(photo) if isinstance(photo, np.ndarray) else photo
    if not isinstance(image, Image.Image):
        raise UserError(f"a photo is a path, a numpy array or a Pillow image, not {type(photo)}")
    _check_size(image.size, "the picture")
    if image.mode in ("F", "I"):
        raise UserError(f"the picture has mode {image.mode}: give 8 or 16 bits a pixel and colour")
    name, image.filename = getattr(image, "filename", ""), ""  # Pillow would map it, see `_opened`
    try:
        return _to_rgb(image)
    except (OSError, SyntaxError, ValueError, AssertionError) as error:  # cut off, or closed
        raise UserError(f"the picture cannot be decoded as RGB ({error!r})") from None
    finally:
        image.filename = name


def _read_file(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: there is no such image file")
    data = path.read_bytes()
    with _opened(data, str(path), REMEDY) as image:
        _check_size(image.size, str(path))
        if image.has_transparency_data:
            return _to_rgb(image)
    return decode(data, cv2.IMREAD_COLOR_RGB, str(path), REMEDY)


def _as_image(pixels: np.ndarray) -> Image.Image:
    is_photo = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if not is_photo or not pixels.size or pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"an array of {pixels.dtype} and shape {pixels.shape} is no photo: give uint8 or "
            "uint16, (H, W), (H, W, 3) or (H, W, 4), in the order RGB"
        )
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Turn a picture upright, and into (H, W, 3) uint8 as it looks on a white page."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow clips them
        grey, clear = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(np.dstack([np.uint8(grey >> 8), np.uint8(255) * (grey != clear)]))
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _check_size(size: tuple[int, int], name: str) -> None:
    """Refuse a (width, height) that is too large."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name}, {width}×{height}, has {width * height / 1e6:.1f} million pixels, at most "
            f"{MAX_PIXELS / 1e6:g} million are read: make it smaller"
        )
