"""Pack a split's JSON, images and masks into one LMDB file, which train.py and test.py read."""

import argparse
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.data_process import token_length_summary
from tools.refer import check_fields, load_plain
from utils.errors import UserError, run_entry_point
from utils.photos import decode
from utils.records import (
    LARGEST,
    LONGEST_KEY,
    META_KEY,
    RELEASE_KEY,
    RecordReader,
    RecordWriter,
    RefRecord,
    open_lmdb,
    repack_command,
)
from utils.tokenizer import has_words, token_lengths

EPILOG = """examples:
  python tools/folder2lmdb.py -j datasets/anns/refcoco/val.json -i datasets/images/train2014 \\
      -m datasets/masks/refcoco -o datasets/lmdb/refcoco
  for split in train val testA testB; do python tools/folder2lmdb.py \\
      -j datasets/anns/refcoco/$split.json -i datasets/images/train2014 \\
      -m datasets/masks/refcoco -o datasets/lmdb/refcoco; done
  python tools/folder2lmdb.py --from-lmdb old/lmdb/refcoco/val.lmdb -o datasets/lmdb/refcoco

writes OUTPUT_DIR/<split>.lmdb when it is complete, named after the JSON; several JSON files make
one LMDB, such as val+testA.lmdb"""

_REDO = "make it again with python tools/data_process.py"
_REDO_MASKS = f"{_REDO} --generate_mask"
_IMAGE_REMEDY = "check -i, or get the image again (tools/prepare_datasets.md)"
_ENTRY_FIELDS = {"segment_id": int, "img_name": str, "sentences": list, "cat": int | None}
_SENTENCE_FIELDS = {"sent": str, "sent_id": int}
_RELEASE_FIELDS = {
    "img": bytes,
    "mask": bytes,
    "cat": int | None,
    "seg_id": int,
    "img_name": str,
    "num_sents": int,
    "sents": list,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Pack a split and print what went into it."""
    args = _parse_args(argv)
    path = pack(args) if args.from_lmdb is None else convert(args)
    print(packed_summary(path))


def packed_summary(path: Path) -> str:
    """Return a text of what lies in a file: counts, size, lengths of the sentences."""
    meta = RecordReader(path).meta
    return (
        f"{path}: {meta['refs']} refs, {meta['sentences']} sentences, {meta['images']} images, "
        f"{path.stat().st_size / 1e6:.1f} MB\n" + token_length_summary(meta["token_length"])
    )


# ------------------------------------------------------------------------ from JSON, images, masks


def pack(args: argparse.Namespace) -> Path:
    """Pack what the JSON files name, and return the LMDB's path."""
    entries = read_entries(args.json)
    for folder, what in ((args.img_dir, "images (-i)"), (args.mask_dir, "masks (-m)")):
        if not folder.is_dir():
            raise UserError(f"the folder of {what} does not exist: {folder}")
    dataset = args.dataset or args.json[0].resolve().parent.name
    split = "+".join(path.stem for path in args.json)
    path = args.output_dir / f"{split}.lmdb"

    sizes: dict[str, tuple[int, int]] = {}
    with RecordWriter(path, dataset, split) as writer:
        for entry in _progress(entries, len(entries), f"{dataset} {split}"):
            key = entry["img_name"]
            if key not in sizes:
                data = read_file(args.img_dir / key, _IMAGE_REMEDY)
                sizes[key] = _size_of(data, str(args.img_dir / key), _IMAGE_REMEDY)
                writer.add_image(key, data)
            mask_path = args.mask_dir / f"{entry['segment_id']}.png"
            mask = read_file(mask_path, _REDO_MASKS)
            record = _make_record(entry, sizes[key], mask, str(mask_path), _REDO_MASKS)
            writer.add_ref(record, token_lengths(record.sentences))
    return path


def read_entries(paths: Sequence[Path]) -> list[dict]:
    """Read and check the JSON of one split, or of several that are packed as one.

    Raises:
        UserError: a file is missing, broken or empty, an entry cannot be packed, or two share a
            ref id or sentence id.
    """
    entries: list[dict] = []
    ref_ids: dict[int, str] = {}
    sent_ids: dict[int, str] = {}
    for path in paths:
        for number, entry in enumerate(_load_list(path)):
            where = f"{path}: entry {number}"
            _check_entry(entry, where)
            _claim_id(ref_ids, "segment_id", entry["segment_id"], where)
            for sentence in entry["sentences"]:
                _claim_id(sent_ids, "sent_id", sentence["sent_id"], where)
            entries.append(entry)
    return entries


def _load_list(path: Path) -> list:
    """Read a JSON file that holds one list, which is not empty."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: make it with python tools/data_process.py")
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): {_REDO}") from None
    if not isinstance(entries, list):
        raise UserError(f"{path} is not a list of refs: {_REDO}")
    if not entries:
        raise UserError(f"{path} has no refs: the split is empty and needs no LMDB")
    return entries


def _claim_id(
    owners: dict[int, str], field: str, number: int, where: str, remedy: str = _REDO
) -> None:
    """Note who has an id, and refuse one that is out of range or that another entry has."""
    if not -LARGEST <= number <= LARGEST:
        raise UserError(f"{where}: {field} {number!r:.40} is out of range: {remedy}")
    if number in owners:
        raise UserError(f"{where} has {field} {number}, as {owners[number]} has: {remedy}")
    owners[number] = where


def _check_entry(entry: object, where: str, remedy: str = _REDO) -> None:
    """Refuse an entry that no record can hold.

    Raises:
        UserError: it lacks a field, or a field has a value that cannot be.
    """
    check_fields(entry, _ENTRY_FIELDS, where, remedy)
    key, category = entry["img_name"], entry["cat"]
    if not _is_text(key) or "\0" in key or len(key.encode()) > LONGEST_KEY:
        raise UserError(
            f"{where}: img_name cannot be {key!r:.80} (at most {LONGEST_KEY} bytes): {remedy}"
        )
    if category is not None and not -LARGEST <= category <= LARGEST:
        raise UserError(f"{where}: cat {category!r:.40} is out of range: {remedy}")
    if not entry["sentences"]:
        raise UserError(f"{where}: sentences is empty")
    for i, sentence in enumerate(entry["sentences"]):
        check_fields(sentence, _SENTENCE_FIELDS, f"{where}, sentence {i}", remedy)
        text = sentence["sent"]
        if not _is_text(text):
            raise UserError(f"{where}, sentence {i}: {text!r:.80} holds half a character: {remedy}")
        if not has_words(text):
            raise UserError(f"{where}, sentence {i}: {text!r:.80} has no words: {remedy}")


def _is_text(value: str) -> bool:
    """Return whether a text can be written down: half a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _make_record(
    entry: dict, size: tuple[int, int], mask: bytes, mask_name: str, remedy: str
) -> RefRecord:
    """Make the record of an entry whose image has `size` (height, width).

    Raises:
        UserError: the mask cannot be decoded, is empty or not of that size.
    """
    ref_id, image_key = entry["segment_id"], entry["img_name"]
    pixels = decode(mask, cv2.IMREAD_GRAYSCALE, mask_name, remedy)
    if pixels.shape != size:
        raise UserError(
            f"{mask_name} is {pixels.shape[0]} x {pixels.shape[1]} pixels, its image {image_key} "
            f"{size[0]} x {size[1]} (height x width): -i or -m is the folder of another data set"
        )
    if not pixels.any():
        raise UserError(f"{mask_name} is an empty mask (ref {ref_id}): {remedy}")
    return RefRecord(
        ref_id=ref_id,
        image_key=image_key,
        image_id=image_id_of(image_key),
        category=entry["cat"],
        height=size[0],
        width=size[1],
        mask=mask,
        sentences=tuple(sentence["sent"] for sentence in entry["sentences"]),
        sent_ids=tuple(sentence["sent_id"] for sentence in entry["sentences"]),
    )


def image_id_of(image_key: str) -> int | None:
    """Return the number that an image's name ends in, as COCO's do; None without one."""
    digits = re.search(r"(?<!\d)\d{1,18}$", Path(image_key).stem)
    return int(digits[0]) if digits else None


def read_file(path: Path, remedy: str) -> bytes:
    """Read a file.

    Raises:
        UserError: it is missing.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: {remedy}")
    return path.read_bytes()


def _size_of(data: bytes, name: str, remedy: str) -> tuple[int, int]:
    """Return an image file's (height, width); all of it is decoded, to be sure that it can be."""
    return decode(data, cv2.IMREAD_COLOR, name, remedy).shape[:2]


# ------------------------------------------------------------------- from the release's own pickles


def convert(args: argparse.Namespace) -> Path:
    """Convert an LMDB of the release, and return the new one's path.

    Each image is stored once, by its name. The release keeps no ids of sentences: they are
    counted from 0 in the order of the file.

    Raises:
        UserError: it is no LMDB of the release, holds anything but plain data, or contradicts
            itself.
    """
    source = args.from_lmdb
    dataset = args.dataset or source.resolve().parent.name
    path = args.output_dir / f"{source.stem}.lmdb"
    if path.resolve() == source.resolve():
        raise UserError(f"{path} is the file to convert: give another folder as -o")
    remedy = f"{source} is damaged, {repack_command(source)}"
    images: dict[str, tuple[tuple[int, int], bytes]] = {}  # size, digest
    ref_ids: dict[int, str] = {}
    count = 0  # of sentences
    with RecordWriter(path, dataset, source.stem) as writer:
        total, items = release_items(source)
        items = _progress(items, total, f"{dataset} {source.stem}")
        for number, item in enumerate(items):
            where = f"{source}: entry {number}"
            _claim_id(ref_ids, "seg_id", item["seg_id"], where, remedy)
            key, digest = item["img_name"], hashlib.sha256(item["img"]).digest()
            texts = item["sents"]
            entry = {
                "segment_id": item["seg_id"],
                "img_name": key,
                "cat": item["cat"],
                "sentences": [{"sent": t, "sent_id": i} for i, t in enumerate(texts, count)],
            }
            _check_entry(entry, where, remedy)
            if key not in images:
                size = _size_of(item["img"], f"{where}, image {key}", remedy)
                images[key] = size, digest
                writer.add_image(key, item["img"])
            elif images[key][1] != digest:
                raise UserError(f"{where} has another image {key} than an earlier entry: {remedy}")
            count += len(texts)
            record = _make_record(entry, images[key][0], item["mask"], f"{where}, mask", remedy)
            writer.add_ref(record, token_lengths(record.sentences))
    print(f"sentence ids: 0 to {count - 1} in the order of {source}, which has none")
    return path


def release_items(path: Path) -> tuple[int, Iterator[dict]]:
    """Return the number of items in an LMDB of the release, and the checked items in order.

    Raises:
        UserError: it is no LMDB of the release, was written with pyarrow, or holds anything but
            plain containers, strings and numbers.
    """
    if not path.exists():
        raise UserError(f"--from-lmdb {path} does not exist")
    file = path / "data.mdb" if path.is_dir() else path
    env = open_lmdb(file)

    def get(key: bytes) -> bytes | None:
        with env.begin() as txn:
            return txn.get(key)

    if get(META_KEY) is not None:
        raise UserError(f"{path} is in this repository's format already: use it as it is")
    if get(RELEASE_KEY) is None:
        raise UserError(f"{path} is no LMDB of the release: {repack_command(path)}")
    count = _unpickle(get(b"__len__"), path, "__len__")
    if not isinstance(count, int):
        raise UserError(f"{path}: __len__ is {count!r:.40}, no number: {repack_command(path)}")

    def items() -> Iterator[dict]:
        for number in range(count):
            item = _unpickle(get(b"%d" % number), path, f"entry {number}")
            _check_item(item, f"{path}: entry {number}", repack_command(path))
            yield item

    return count, items()


def _unpickle(data: bytes | None, path: Path, what: str) -> object:
    if data is None:
        raise UserError(f"{path} has no {what}: {repack_command(path)}")
    if data[:1] != b"\x80":  # how every pickle begins since protocol 2
        raise UserError(
            f"{path}: {what} is no pickle; written with pyarrow.serialize, it cannot be read any "
            f"more: {repack_command(path)}"
        )
    return load_plain(io.BytesIO(data), f"{path}: {what}")


def _check_item(item: object, where: str, remedy: str) -> None:
    check_fields(item, _RELEASE_FIELDS, where, remedy)
    texts = item["sents"]
    if not texts or len(texts) != item["num_sents"]:
        raise UserError(f"{where} has {len(texts)} sents, num_sents {item['num_sents']}: {remedy}")


def _progress(items: Iterable, total: int, name: str) -> Iterable:
    """Show a bar with an ETA, on a terminal."""
    return tqdm(items, total=total, desc=name, unit="ref", disable=None)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        *("-j", "--json"),
        type=Path,
        nargs="+",
        help="anns/<dataset>/<split>.json; several are packed as one split, <a>+<b>",
    )
    add("-i", "--img-dir", type=Path, help="folder of the images")
    add("-m", "--mask-dir", type=Path, help="folder of the masks")
    add(
        "--from-lmdb",
        type=Path,
        metavar="OLD.lmdb",
        help="convert an LMDB that the release pickled, instead of -j, -i and -m",
    )
    add("-o", "--output-dir", type=Path, required=True, help="folder for <split>.lmdb")
    add("--dataset", help="name stored in the file (that of the folder of the JSON or old LMDB)")
    args = parser.parse_args(argv)
    given = [args.json, args.img_dir, args.mask_dir]
    if any(given) if args.from_lmdb else not all(given):
        parser.error("give -j, -i and -m, or --from-lmdb alone")
    return args


if __name__ == "__main__":
    run_entry_point(main)
