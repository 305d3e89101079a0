"""Photos as people have them: formats, depths, transparency, orientation, size, damage."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import encoded, smooth_photo, user_error
from PIL import Image

from utils.errors import UserError
from utils.photos import decode, read_photo
from utils.transforms import decode_image

PIXELS = smooth_photo(np.random.default_rng(0), 37, 53)
WHITE = (255, 255, 255)
SAMPLES = b"\x15\x01\x03\0\x01\0\0\0%c\0"  # a TIFF's tag: values of a pixel


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(PIXELS).convert(mode)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def announced_png(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, and has none."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", size), (b"IDAT", b""), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        chunks += struct.pack(">I", len(data)) + kind + data + checksum
    return chunks


def as_published(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


@pytest.mark.parametrize(
    ("suffix", "mode", "options"),
    [
        *(("jpg", mode, {}) for mode in ("RGB", "L", "CMYK")),
        *(("jpg", "RGB", {"progressive": True, "subsampling": s}) for s in (0, 1, 2)),
        *(("png", mode, {}) for mode in ("RGB", "L", "P", "1", "LA", "RGBA")),
        *((suffix, "RGB", {}) for suffix in ("webp", "bmp", "tif", "avif")),
        ("gif", "P", {}),
    ],
)
def test_a_file_is_decoded_as_published_and_much_as_pillow_does(tmp_path, suffix, mode, options):
    path = tmp_path / f"photo.{suffix}"
    picture(mode).save(path, **options)
    found = read_photo(path)
    assert (found.shape, found.dtype) == ((37, 53, 3), np.uint8)
    assert np.array_equal(found, as_published(path.read_bytes()))
    assert np.array_equal(found, decode_image(path.read_bytes(), "x"))
    with Image.open(path) as image:  # CMYK is rounded in another order
        assert np.abs(found.astype(int) - read_photo(image)).max() <= 1
    assert np.array_equal(read_photo(str(path)), found)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "grey.tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_camera_is_followed(tmp_path, suffix, orientation):
    path = tmp_path / f"photo.{suffix}"
    stored = Image.fromarray(np.repeat(np.repeat(PIXELS[:4, :6], 32, axis=0), 32, axis=1))
    stored = stored.convert("L") if "grey" in suffix else stored
    stored.save(path, exif=turned(orientation), **({"lossless": True} if suffix == "webp" else {}))
    flips = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
    turns = [getattr(Image.Transpose, name) for name in flips.split()]
    expected = stored if orientation == 1 else stored.transpose(turns[orientation - 2])
    expected = np.asarray(expected.convert("RGB"))
    found = read_photo(path)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 3
    if suffix != "avif":  # which OpenCV does not turn
        assert np.array_equal(found, as_published(path.read_bytes()))
    with Image.open(path) as image:
        assert np.abs(read_photo(image).astype(int) - found).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "avif"])
def test_the_orientation_of_a_cut_out_is_followed(tmp_path, suffix):
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[:, 30:] = 255, 0, 0, 255
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(pixels).save(path, exif=turned(6))
    found = read_photo(path)
    assert found.shape == (60, 40, 3)
    assert (found[:28] == WHITE).all()
    assert (found[32:, :, 1] < 80).all()


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("png", "RGBA"), ("png", "LA"), ("png", "P"), ("gif", "RGBA"), ("webp", "RGBA")],
)
def test_what_is_transparent_becomes_white(tmp_path, suffix, mode):
    image = picture("RGBA")
    alpha = np.zeros((37, 53), np.uint8)
    alpha[:, 20:] = 255
    image.putalpha(Image.fromarray(alpha))
    path = tmp_path / f"photo.{suffix}"
    image.convert(mode).save(path, **({"lossless": True} if suffix == "webp" else {}))
    found = read_photo(path)
    assert (found[:, :20] == WHITE).all()
    expected = np.asarray(picture("L").convert("RGB")) if mode == "LA" else PIXELS
    allowed = 60 if mode == "P" or suffix == "gif" else 0  # a palette has 256 colours
    assert np.abs(found[:, 20:].astype(int) - expected[:, 20:]).max() <= allowed
    with Image.open(path) as opened:
        assert np.array_equal(read_photo(opened), found)


def test_half_transparent_pixels_are_mixed_with_white_from_any_source(tmp_path):
    pixels = np.dstack([np.zeros((8, 9, 3), np.uint8), np.full((8, 9), 128, np.uint8)])
    path = tmp_path / "half.png"
    Image.fromarray(pixels).save(path)
    for source in (path, pixels, Image.fromarray(pixels), pixels.astype(np.uint16) * 256):
        assert np.abs(read_photo(source).astype(int) - 127).max() <= 1


def test_16_bits_keep_their_upper_8_from_any_source(tmp_path):
    grey16 = np.arange(37 * 53, dtype=np.uint16).reshape(37, 53) * 33
    expected = np.repeat((grey16 >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for name in ("grey.png", "grey.tif"):
        path = tmp_path / name
        path.write_bytes(encoded(grey16, path.suffix))
        assert np.array_equal(as_published(path.read_bytes()), expected)
        assert np.array_equal(read_photo(path), expected)
        with Image.open(path) as image:
            assert np.array_equal(read_photo(image), expected)
    assert np.array_equal(read_photo(grey16), expected)
    expected[grey16 == 33] = 255
    Image.fromarray(grey16).save(path := tmp_path / "clear.png", transparency=33)
    with Image.open(path) as image:
        assert np.array_equal(read_photo(image), expected)
    assert np.array_equal(read_photo(path), expected)
    colour16 = PIXELS.astype(np.uint16) * 256 + 99
    (tmp_path / "colour.png").write_bytes(encoded(colour16[..., ::-1]))
    for source in (colour16, tmp_path / "colour.png"):
        assert np.array_equal(read_photo(source), PIXELS)


def test_arrays_are_rgb_grey_or_rgba():
    assert np.array_equal(read_photo(PIXELS), PIXELS)
    assert np.array_equal(read_photo(PIXELS[:, ::-1]), PIXELS[:, ::-1])
    grey = PIXELS[..., 0]
    for source in (grey, grey[..., None]):
        assert np.array_equal(read_photo(source), np.dstack([grey] * 3))
    opaque = np.dstack([PIXELS, np.full(grey.shape, 255, np.uint8)])
    assert np.array_equal(read_photo(opaque), PIXELS)


@pytest.mark.parametrize(
    "photo",
    [
        np.zeros((4, 4), np.float32), np.zeros((4, 4), bool), np.zeros((0, 5, 3), np.uint8),
        np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((2, 4, 4, 3), np.uint8),
    ],
    ids=lambda photo: f"{photo.dtype} {photo.shape}",
)  # fmt: skip
def test_other_arrays_are_refused_with_their_shape(photo):
    line = user_error(read_photo, photo)
    assert "is no photo: give uint8" in line
    assert str(photo.shape) in line


def test_other_things_are_refused():
    assert "a path, a numpy array or a Pillow image" in user_error(read_photo, [[1, 2], [3, 4]])
    assert "mode F" in user_error(read_photo, picture("F"))
    with Image.open(io.BytesIO(encoded(PIXELS))) as closed:
        pass
    for broken in (Image.open(io.BytesIO(encoded(PIXELS, ".jpg")[:700])), closed):
        assert "cannot be decoded as RGB" in user_error(read_photo, broken)


def test_a_camera_that_puts_two_pictures_into_a_file_is_understood(tmp_path):
    path = tmp_path / "stereo.jpg"
    picture().save(path, "MPO", save_all=True, append_images=[picture().rotate(180)])
    assert np.abs(read_photo(path).astype(int) - PIXELS).mean() < 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file"),
        (b"<html>not found</html>", "cannot be decoded (22 bytes; cut off"),
        (encoded(PIXELS)[:300], "cannot be decoded (300 bytes; cut off"),
        (encoded(PIXELS, ".jpg")[:700], "cannot be decoded (700 bytes; cut off"),
        (encoded(PIXELS)[:20], "cannot be decoded (20 bytes; cut off"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
        (encoded(PIXELS, ".tif").replace(SAMPLES % 3, SAMPLES % 8), "cannot be decoded"),
    ],
)
def test_what_is_no_image_is_one_line(tmp_path, caplog, content, message):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    line = user_error(read_photo, path)
    assert message in line
    assert str(path) in line
    assert not caplog.records


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_a_png_cut_or_damaged_anywhere_is_one_line_and_the_decoder_prints_none(capfd, mode):
    file = io.BytesIO()
    picture(mode).resize((9, 7)).save(file, "PNG")
    data = file.getvalue()
    contents = [data[:length] for length in range(9, len(data))]
    # A wrong byte at each place up to the last chunk in turn.
    damaged = ((i, bytes([data[i] ^ 0x55])) for i in range(8, len(data) - 12))
    contents += [data[:i] + wrong + data[i + 1 :] for i, wrong in damaged]
    for content in contents:
        line = user_error(decode, content, cv2.IMREAD_COLOR, "it", "replace it")
        assert "cut off or no image" in line
    assert capfd.readouterr().err == ""


def test_what_follows_the_end_of_a_png_is_ignored():
    assert np.array_equal(decode_image(encoded(PIXELS[..., ::-1]) + b"more", "it"), PIXELS)


def test_a_missing_file_a_folder_and_a_device_are_no_image_files(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path, Path("/dev/zero")):
        assert "there is no such image file" in user_error(read_photo, path)


def test_larger_photos_than_allowed_are_refused_with_their_size(tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    picture().save(path)
    for source in (path, PIXELS, picture()):
        monkeypatch.setattr("utils.photos.MAX_PIXELS", 53 * 37)
        assert read_photo(source).shape == (37, 53, 3)
        monkeypatch.setattr("utils.photos.MAX_PIXELS", 53 * 37 - 1)
        with pytest.raises(UserError, match=r"53×37, has 0.0 million pixels, at most 0.00196 mil"):
            read_photo(source)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((10_001, 10_000), "100.0 million pixels, at most 100 million are read"),
        ((20_000, 20_000), "is too large to be read: .*400000000 pixels"),
        ((2**31 - 1, 2**31 - 1), "is too large to be read: .*4611686014132420609 pixels"),
    ],
)
def test_a_picture_that_announces_to_be_huge_is_never_decoded(tmp_path, monkeypatch, size, message):
    monkeypatch.setattr("cv2.imdecode", None)
    path = tmp_path / "bomb.png"
    path.write_bytes(announced_png(*size))
    with pytest.raises(UserError, match=message):
        read_photo(path)


def test_a_size_that_the_decoder_cannot_take_is_one_line():
    with pytest.raises(UserError, match=r"^it cannot be decoded [^\n]*: replace it$"):
        decode(announced_png(50_000, 50_000), cv2.IMREAD_COLOR, "it", "replace it")
