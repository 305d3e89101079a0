"""One split's JSON, its images and its masks -> one LMDB file that train.py and test.py read."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.data_process import token_length_summary
from tools.refer import check_fields
from utils.errors import UserError, run
from utils.records import RecordReader, RecordWriter, RefRecord
from utils.tokenizer import token_lengths

EPILOG = """examples:
  python tools/folder2lmdb.py -j datasets/anns/refcoco/val.json -i datasets/images/train2014 \\
      -m datasets/masks/refcoco -o datasets/lmdb/refcoco
  for split in train val testA testB; do python tools/folder2lmdb.py \\
      -j datasets/anns/refcoco/$split.json -i datasets/images/train2014 \\
      -m datasets/masks/refcoco -o datasets/lmdb/refcoco; done

writes OUTPUT_DIR/<split>.lmdb when it is complete, named after the JSON; several JSON files make
one LMDB, such as val+testA.lmdb"""

_REDO = "make it again with python tools/data_process.py"
_REDO_MASKS = f"{_REDO} --generate_mask"
_IMAGE_REMEDY = "check -i, or get the image again (tools/prepare_datasets.md)"
_ENTRY_FIELDS = {"segment_id": int, "img_name": str, "sentences": list, "cat": int | None}
_SENTENCE_FIELDS = {"sent": str, "sent_id": int}


def main(argv: Sequence[str] | None = None) -> None:
    """Pack a split and print what went into it."""
    args = _parse_args(argv)
    entries = load_entries(*args.json)
    for folder, what in ((args.img_dir, "images (-i)"), (args.mask_dir, "masks (-m)")):
        if not folder.is_dir():
            raise UserError(f"the folder of {what} does not exist: {folder}")
    dataset = args.dataset or args.json[0].resolve().parent.name
    split = "+".join(path.stem for path in args.json)
    path = args.output_dir / f"{split}.lmdb"

    sizes: dict[str, tuple[int, int]] = {}
    with RecordWriter(path, dataset, split) as writer:
        for entry in tqdm(entries, desc=f"{dataset} {split}", unit="ref"):
            key = entry["img_name"]
            if key not in sizes:
                name = args.img_dir / key
                data = read_file(name, _IMAGE_REMEDY)
                image = decode(data, cv2.IMREAD_COLOR, str(name), _IMAGE_REMEDY)
                sizes[key] = image.shape[:2]
                writer.add_image(key, data)
            record = make_record(entry, sizes[key], args.mask_dir)
            writer.add_ref(record, token_lengths(record.sentences))

    print(packed_summary(path))


def packed_summary(path: Path) -> str:
    """What lies in a file: counts, size, lengths of the sentences."""
    meta = RecordReader(path).meta
    return (
        f"{path}: {meta['refs']} refs, {meta['sentences']} sentences, {meta['images']} images, "
        f"{path.stat().st_size / 1e6:.1f} MB\n" + token_length_summary(meta["token_length"])
    )


def load_entries(*paths: Path) -> list[dict]:
    """Read and check the JSON of one split, or of several that are packed as one.

    Raises:
        UserError: a file is missing, broken or empty, or an entry lacks a field, or two share a
            ref id or sentence id.
    """
    entries: list[dict] = []
    ref_ids: dict[int, str] = {}
    sent_ids: dict[int, str] = {}
    for path in paths:
        for number, entry in enumerate(_load_json(path)):
            where = f"{path}: entry {number}"
            _check_entry(entry, where)
            _check_unique(ref_ids, entry["segment_id"], "segment_id", where)
            for sentence in entry["sentences"]:
                _check_unique(sent_ids, sentence["sent_id"], "sent_id", where)
            entries.append(entry)
    return entries


def _load_json(path: Path) -> list:
    if not path.is_file():
        raise UserError(f"{path} does not exist: make it with python tools/data_process.py")
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): {_REDO}") from None
    if not isinstance(entries, list):
        raise UserError(f"{path} is not a list of refs: {_REDO}")
    if not entries:
        raise UserError(f"{path} has no refs: the split is empty and needs no LMDB")
    return entries


def _check_entry(entry: object, where: str) -> None:
    check_fields(entry, _ENTRY_FIELDS, where, _REDO)
    if not entry["sentences"]:
        raise UserError(f"{where}: sentences is empty")
    for i, sentence in enumerate(entry["sentences"]):
        check_fields(sentence, _SENTENCE_FIELDS, f"{where}, sentence {i}", _REDO)


def make_record(entry: dict, size: tuple[int, int], mask_dir: Path) -> RefRecord:
    """Make the record of one entry, reading and checking its mask.

    Args:
        entry: an entry of the split's JSON.
        size: (height, width) of its image as decoded.
        mask_dir: folder with <ref_id>.png.

    Raises:
        UserError: the mask is missing, cannot be decoded, is empty or not of that size.
    """
    ref_id, image_key = entry["segment_id"], entry["img_name"]
    path = mask_dir / f"{ref_id}.png"
    data = read_file(path, _REDO_MASKS)
    mask = decode(data, cv2.IMREAD_GRAYSCALE, str(path), _REDO_MASKS)
    if mask.shape != size:
        raise UserError(
            f"{path} is {mask.shape[0]} x {mask.shape[1]} pixels, its image {image_key} "
            f"{size[0]} x {size[1]} (height x width): -i or -m is the folder of another data set"
        )
    if not mask.any():
        raise UserError(f"{path} is an empty mask (ref {ref_id}): {_REDO_MASKS}")
    return RefRecord(
        ref_id=ref_id,
        image_key=image_key,
        image_id=image_id_of(image_key),
        category=entry["cat"],
        height=size[0],
        width=size[1],
        mask=data,
        sentences=tuple(sentence["sent"] for sentence in entry["sentences"]),
        sent_ids=tuple(sentence["sent_id"] for sentence in entry["sentences"]),
    )


def image_id_of(image_key: str) -> int | None:
    """The number at the end of an image's name, as COCO names its files; None without one."""
    digits = re.search(r"(?<!\d)\d{1,18}$", Path(image_key).stem)
    return int(digits[0]) if digits else None


def read_file(path: Path, remedy: str) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: it is missing.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: {remedy}")
    return path.read_bytes()


def decode(data: bytes, flags: int, name: str, remedy: str) -> np.ndarray:
    """The pixels of an image file, (H, W) or (H, W, channels), as cv2's `flags` say.

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


def _check_unique(seen: dict[int, str], key: int, field: str, where: str) -> None:
    if key in seen:
        raise UserError(f"{where} has {field} {key}, as {seen[key]} has: {_REDO}")
    seen[key] = where


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        *("-j", "--json"),
        type=Path,
        required=True,
        nargs="+",
        help="anns/<dataset>/<split>.json; several are packed as one split, <a>+<b>",
    )
    add("-i", "--img-dir", type=Path, required=True, help="folder of the images")
    add("-m", "--mask-dir", type=Path, required=True, help="folder of the masks")
    add("-o", "--output-dir", type=Path, required=True, help="folder for <split>.lmdb")
    add("--dataset", help="name stored in the file (the JSON's folder)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
