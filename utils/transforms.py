"""Between a photo and the network's square: decoding, letterbox, normalisation, and the way back.

Sizes are (height, width) in pixels, images uint8 RGB of shape (H, W, 3), masks uint8 (H, W) with
0 = background. S is the side of the network's input.
"""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.photos import decode
from utils.records import RecordReader, RefRecord

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BORDER = tuple(255 * value for value in CLIP_MEAN)


@dataclass(frozen=True)
class Protocol:
    """Describe how a probability map at S/4 becomes a mask at the photo's size.

    target: how a training mask is brought to S/4 for this geometry (`model.loss.resize_target`).
    align_corners: of the upsampling to S×S.
    threshold: a pixel above it is foreground.
    no_target_pixels: where sentences may be true of nothing, a mask of fewer is emptied.
    """

    target: str
    align_corners: bool
    threshold: float
    no_target_pixels: int = 1


PROTOCOLS = {
    "published": Protocol(target="nearest", align_corners=True, threshold=0.35),
    "aligned": Protocol(target="area", align_corners=False, threshold=0.5),
}


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode a JPEG or PNG to (H, W, 3) uint8 RGB; `name` is for the error."""
    return decode(data, cv2.IMREAD_COLOR_RGB, name, "replace it")


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """Decode a mask's PNG to (H, W) uint8; `name` is for the error."""
    return decode(data, cv2.IMREAD_GRAYSCALE, name, "replace it")


def letterbox_matrices(size: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the affine map of a photo into the centre of a square, and its inverse.

    Args:
        size: (H, W) of the photo.
        side: S.
    Returns:
        Two (2, 3) float64 matrices on (x, y, 1): photo to square, square to photo.
    """
    height, width = size
    scale = min(side / height, side / width)
    corners = np.array([[0, 0], [width, 0], [0, height]])
    offset = (side - width * scale) / 2, (side - height * scale) / 2
    photo, square = corners.astype(np.float32), (corners * scale + offset).astype(np.float32)
    return cv2.getAffineTransform(photo, square), cv2.getAffineTransform(square, photo)


def letterbox_image(image: np.ndarray, side: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (S, S, 3), cubic; the border is CLIP's mean colour."""
    forward, _ = letterbox_matrices(image.shape[:2], side)
    return cv2.warpAffine(image, forward, (side, side), flags=cv2.INTER_CUBIC, borderValue=BORDER)


def letterbox_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """Resize (H, W) uint8 to (S, S), linear, so that edges are soft; the border is 0."""
    forward, _ = letterbox_matrices(mask.shape, side)
    return cv2.warpAffine(mask, forward, (side, side), flags=cv2.INTER_LINEAR, borderValue=0)


def load_image(reader: RecordReader, ref: RefRecord, side: int) -> np.ndarray:
    """Return the ref's photo in the network's square: (S, S, 3) uint8 RGB."""
    image = decode_image(reader.image(ref.image_key), f"{reader.path}, image {ref.image_key}")
    if image.shape[:2] != (ref.height, ref.width):
        raise UserError(
            f"{reader.path}, image {ref.image_key} is {image.shape[1]}×{image.shape[0]} pixels, "
            f"ref {ref.ref_id} says {ref.width}×{ref.height}; pack the split again"
        )
    return letterbox_image(image, side)


def load_mask(ref: RefRecord) -> np.ndarray:
    """Return the ref's mask at the photo's size: (H, W) uint8, non-zero is the referent."""
    return decode_mask(ref.mask, f"mask of ref {ref.ref_id}")


def load_square_mask(ref: RefRecord, side: int) -> np.ndarray:
    """Return the ref's mask in the network's square: (S, S) uint8, soft at the edges."""
    return letterbox_mask(load_mask(ref), side)


def normalize_images(images: Tensor) -> Tensor:
    """Turn a batch of letterboxed photos, on its device, into the network's input.

    Args:
        images: (B, S, S, 3) uint8 RGB.
    Returns:
        (B, 3, S, S) float32, CLIP's mean and deviation removed; channels-last in memory.
    """
    mean, std = _clip_statistics(images.device)
    return images.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)


@cache
def _clip_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Keep CLIP's mean and deviation, (1, 3, 1, 1) each; a new copy would stall a GPU's host."""
    with torch.inference_mode(False):
        mean = torch.tensor(CLIP_MEAN, device=device).view(1, 3, 1, 1)
        return mean, torch.tensor(CLIP_STD, device=device).view(1, 3, 1, 1)


def normalize_masks(masks: Tensor) -> Tensor:
    """Turn (B, S, S) uint8 in [0, 255] into (B, 1, S, S) float32 in [0, 1]."""
    return masks.unsqueeze(1).float().div_(255)


def upsample_probability(probability: Tensor, side: int, protocol: Protocol) -> Tensor:
    """Enlarge (B, 1, S/4, S/4) in [0, 1] to (B, S, S), bicubic (may leave [0, 1] a little)."""
    full = F.interpolate(
        probability, (side, side), mode="bicubic", align_corners=protocol.align_corners
    )
    return full.squeeze(1)


def restore_size(square: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Undo the letterbox: (S, S) float32 -> (H, W) float32 at the photo's size, cubic."""
    _, inverse = letterbox_matrices(size, square.shape[0])
    height, width = size
    return cv2.warpAffine(square, inverse, (width, height), flags=cv2.INTER_CUBIC, borderValue=0.0)
