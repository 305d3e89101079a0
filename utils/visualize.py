"""Pictures of predictions that a person can judge at a glance."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.files import atomic_path

TRUTH_COLOR, PRED_COLOR = (46, 204, 113), (255, 64, 129)
PANEL_WIDTH, MARGIN, FONT_SIZE = 360, 8, 18


def overlay(image: np.ndarray, mask: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Tint a mask on a copy of a photo, and draw the mask's outline.

    Args:
        image: (H, W, 3) uint8 RGB, as is what is returned.
        mask: (H, W) bool.
        color: RGB.
    """
    tinted = image.copy()
    tinted[mask] = (0.5 * image[mask] + 0.5 * np.array(color)).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    thickness = max(1, round(max(image.shape[:2]) / 250))
    cv2.drawContours(tinted, outlines, -1, color, thickness)
    return tinted


def fade(image: np.ndarray) -> np.ndarray:
    """Return a photo (H, W, 3) uint8 paler and with a quarter of its colour, as the report does.

    A mask stands out on it whatever the photo's colours are.
    """
    grey = image.mean(axis=2, keepdims=True)
    return (0.72 * (0.25 * image + 0.75 * grey) + 0.28 * 255).round().astype(np.uint8)


def heat_map(probability: np.ndarray) -> np.ndarray:
    """Colour (H, W) float as (H, W, 3) uint8 RGB, from 0 in dark blue over green to 1 in yellow."""
    levels = (255 * probability).round().astype(np.uint8)
    return cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[..., ::-1]


def comparison(
    image: np.ndarray, mask: np.ndarray, pred_mask: np.ndarray, sentence: str, iou: float
) -> Image.Image:
    """Photo, ground truth and prediction side by side under the sentence and its IoU.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask, pred_mask: (H, W) bool; an empty mask: the sentence has no target.
        iou: in [0, 1].
    """
    height = round(image.shape[0] * PANEL_WIDTH / image.shape[1])
    height = min(max(1, height), 4 * PANEL_WIDTH)  # a tower of a photo is squeezed
    is_none = not mask.any()
    is_right = is_none and not pred_mask.any()
    panels = {
        "photo": image,
        f"ground truth{': no target' * is_none}": overlay(image, mask, TRUTH_COLOR),
        f"prediction{': nothing found' * is_right}": overlay(image, pred_mask, PRED_COLOR),
    }
    font = ImageFont.load_default(FONT_SIZE)
    lines = textwrap.wrap(f"“{sentence}”   IoU {iou:.2f}", 100) or [""]
    line_height = FONT_SIZE + 6
    head = MARGIN + line_height * len(lines)
    width = 3 * PANEL_WIDTH + 4 * MARGIN
    canvas = Image.new("RGB", (width, head + line_height + height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for row, line in enumerate(lines):
        draw.text((MARGIN, MARGIN / 2 + row * line_height), line, "black", font)
    for column, (title, panel) in enumerate(panels.items()):
        left = MARGIN + column * (PANEL_WIDTH + MARGIN)
        draw.text((left, head), title, "gray", font)
        resized = cv2.resize(panel, (PANEL_WIDTH, height), interpolation=cv2.INTER_AREA)
        canvas.paste(Image.fromarray(resized), (left, head + line_height))
    return canvas


def grid(cells: Sequence[Image.Image], columns: int, gap: int) -> Image.Image:
    """Set pictures in rows on white, `gap` pixels between and around fields of the largest."""
    width, height = (max((c.size[side] for c in cells), default=0) + gap for side in (0, 1))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (gap + i % columns * width, gap + i // columns * height))
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG or JPEG, whole or not at all; the suffix chooses."""
    with atomic_path(path) as partial:
        picture.save(partial, format={".jpg": "JPEG"}.get(path.suffix, "PNG"))


def file_stem(text: str, limit: int = 80) -> str:
    """Write a sentence as part of a file name: letters and digits of any script, the rest as `_`.

    `limit` counts bytes of UTF-8, as file systems do (255 for a whole name, as a rule).
    """
    name = "".join(c if c.isalnum() else "_" for c in text)
    return name.encode()[:limit].decode(errors="ignore").strip("_") or "empty"
