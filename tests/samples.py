"""Small inputs that several test files share: records, models, images. All from fixed seeds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from golden.fill import filled
from PIL import Image

from model.clip_archive import ClipSizes
from model.segmenter import Segmenter, assemble
from utils.records import RecordReader, RecordWriter, RefRecord
from utils.tokenizer import token_lengths

ROOT = Path(__file__).resolve().parents[1]
SIZES = ClipSizes(  # of the golden case "tiny"
    embed_dim=96,
    image_resolution=224,
    vision_layers=(1, 2, 1, 1),
    vision_width=8,
    context_length=77,
    vocab_size=512,
    transformer_width=64,
    transformer_heads=1,
    transformer_layers=2,
)
COLOURS = ("red", "green", "blue", "white", "yellow", "black")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute in so many threads: another number gives other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def small_segmenter(sizes: ClipSizes = SIZES, dropout: float = 0.0, **recompute: bool) -> Segmenter:
    """The golden case "tiny", or another CLIP under the same head, with the golden weights."""
    width = sizes.transformer_width
    model = assemble(sizes, (32, width, 96), width, 2, 4, 128, dropout, **recompute)
    model.load_state_dict(filled(model.state_dict()))
    return model


def random_batch(
    count: int, side: int, *, vocab: int = SIZES.vocab_size, word_len: int = 12
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Photos (B, S, S, 3) uint8, tokens (B, L) with 3 + b words, soft masks (B, 1, S, S)."""
    rng = np.random.default_rng(0)
    photos = np.stack([smooth_photo(rng, side, side) for _ in range(count)])
    tokens = np.zeros((count, word_len), np.int64)
    for b, row in enumerate(tokens):
        words = 3 + b
        row[: words + 2] = [vocab - 2, *rng.integers(1, vocab - 2, words), vocab - 1]
    masks = rng.random((count, 1, side, side), np.float32)
    return torch.from_numpy(photos), torch.from_numpy(tokens), torch.from_numpy(masks)


def smooth_photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Coloured clouds: (H, W, 3) uint8."""
    return cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), (width, height))


def save_photo(path: Path, seed: int = 1, size: tuple[int, int] = (70, 100)) -> Path:
    """A file of coloured clouds of a (height, width)."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(smooth_photo(np.random.default_rng(seed), *size)).save(path)
    return path


def blob(height: int, width: int, share: float = 0.1, seed: int = 0) -> np.ndarray:
    """A smooth random shape that covers `share` of the image: (H, W) uint8, 0 or 255."""
    rng = np.random.default_rng(seed)
    radius = np.sqrt(share * height * width / np.pi)
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    reach = radius * (1 + 0.25 * np.sin(3 * angles + rng.uniform(0, 6)) * rng.uniform(0.4, 1))
    centre = rng.uniform(0.35, 0.65, 2) * (width, height)
    points = centre + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mask = np.zeros((height, width), np.uint8)
    return cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 255)


def encoded(image: np.ndarray, suffix: str = ".png") -> bytes:
    """An image file's bytes; colours as OpenCV has them (BGR)."""
    return cv2.imencode(suffix, image)[1].tobytes()


def sample_ref(position: int, image: int, size: tuple[int, int], num_sentences: int) -> RefRecord:
    """The ref at `position`: a blob that covers a tenth, and sentences that name no other ref."""
    colour = COLOURS[position % len(COLOURS)]
    return RefRecord(
        ref_id=100 + position,
        image_key=f"image_{image}.jpg",
        image_id=image,
        category=position % 5,
        height=size[0],
        width=size[1],
        mask=encoded(blob(*size, seed=position)),
        sentences=tuple(f"{colour} thing {position} {n}" for n in range(num_sentences)),
        sent_ids=tuple(1000 * position + n for n in range(num_sentences)),
    )


def write_records(path: Path, refs_per_image: Sequence[int]) -> Path:
    """Pack photos of different sizes with so many refs each, of 1-4 sentences each."""
    rng = np.random.default_rng(0)
    position = 0
    with RecordWriter(path, "shapes", path.stem) as writer:
        for image, count in enumerate(refs_per_image):
            size = (72 + 8 * (image % 5), 110 - 9 * (image % 7))
            writer.add_image(f"image_{image}.jpg", encoded(smooth_photo(rng, *size), ".jpg"))
            for _ in range(count):
                ref = sample_ref(position, image, size, 1 + position % 4)
                writer.add_ref(ref, token_lengths(ref.sentences))
                position += 1
    return path


def all_refs(path: Path) -> list[RefRecord]:
    """Every ref of a file."""
    reader = RecordReader(path)
    return [reader.ref(position) for position in range(len(reader))]


def with_bad_image(source: Path, target: Path, content: bytes) -> Path:
    """A copy of the records in which the last image's file is replaced."""
    reader, refs = RecordReader(source), all_refs(source)
    with RecordWriter(target, "shapes", target.stem) as writer:
        for ref in refs:
            is_last = ref.image_key == refs[-1].image_key
            writer.add_image(ref.image_key, content if is_last else reader.image(ref.image_key))
            writer.add_ref(ref, [4] * len(ref.sentences))
    return target
