"""Pack a split's JSON, images and masks into one LMDB file, which train.py and test.py read."""

import argparse
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NotRequired

import cv2
import numpy as np
from pydantic import Field, TypeAdapter
from tqdm import tqdm
from typing_extensions import TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.data_process import encode_mask
from tools.odd_records import EMPTY, MISSING_MASK, MISSING_PHOTO, OddError, OddRecords
from tools.refer import (
    ImageKey,
    Number,
    Sentences,
    Text,
    load_plain,
    must,
    read_as,
    read_file,
    refuse_seen,
)
from utils.arguments import text_parser
from utils.errors import UserError, run_entry_point
from utils.photos import decode, read_mask
from utils.records import (
    META_KEY,
    RELEASE_KEY,
    REPACK,
    RecordReader,
    RecordWriter,
    RefRecord,
    open_lmdb,
)

EPILOG = """examples:
  python tools/folder2lmdb.py -j datasets/anns/refcoco/val.json -i datasets/images/train2014 \\
      -m datasets/masks/refcoco -o datasets/lmdb/refcoco
  python tools/folder2lmdb.py --from-lmdb old/lmdb/refcoco/val.lmdb -o datasets/lmdb/refcoco

writes OUTPUT_DIR/<split>.lmdb when it is complete, named after the JSON; several JSON files make
one LMDB, such as val+testA.lmdb"""

_REDO = "make it again with python tools/data_process.py"
_MASK_REMEDY = f"check -m and --images, or {_REDO} --generate_mask"
_IMAGE_REMEDY = "check --images, or get the image again (tools/prepare_datasets.md)"


class Entry(TypedDict):
    """Describe a ref in the JSON of a split."""

    segment_id: Number
    img_name: ImageKey
    cat: Number | None
    sentences: Sentences
    num_targets: NotRequired[Annotated[int, Field(ge=0, lt=2**31)]]  # 1 where it is missing


class ReleaseItem(TypedDict):
    """Describe a ref in an LMDB of the release."""

    img: bytes
    mask: bytes
    cat: Number | None
    seg_id: Number
    img_name: ImageKey
    sents: Annotated[list[Text], must(bool, "one or more")]


_LIST, _ENTRY = TypeAdapter(list), TypeAdapter(Entry)
_RELEASE_ITEM = TypeAdapter(ReleaseItem)


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


def token_length_summary(histogram: Mapping[int, int]) -> str:
    """Return how long the sentences are, and how many each published `word_len` cuts."""
    counts = "  ".join(f"{length}:{histogram[length]}" for length in sorted(histogram))
    cut = {k: sum(n for length, n in histogram.items() if length > k) for k in (17, 22)}
    cuts = ", at ".join(f"{word_len}: {count}" for word_len, count in cut.items())
    return (
        f"sentences by tokens, start and end included (tokens:sentences): {counts}\n"
        f"cut at word_len {cuts}, of {sum(histogram.values())} sentences"
    )


# ------------------------------------------------------------------------ from JSON, images, masks


def pack(args: argparse.Namespace) -> Path:
    """Pack what the JSON files name, and return the LMDB's path."""
    for folder, what in ((args.img_dir, "images (-i)"), (args.mask_dir, "masks (-m)")):
        if not folder.is_dir():
            raise UserError(f"the folder of {what} does not exist: {folder}")
    dataset = args.dataset or args.json[0].resolve().parent.name
    split = "+".join(path.stem for path in args.json)
    path = args.output_dir / f"{split}.lmdb"
    odd = OddRecords(args.skip_odd)
    entries = read_entries(args.json, odd)
    sizes: dict[str, tuple[int, int]] = {}
    whitened = 0
    with RecordWriter.open(path, dataset, split) as writer:
        for place, entry in tqdm(entries, desc=f"{dataset} {split}", unit="ref", disable=None):
            key, number = entry["img_name"], entry["segment_id"]
            with odd.catch("unreadable file", split, place):
                photo_path = find_photo(args.img_dir, key)
                mask_path = args.mask_dir / f"{number}.png"
                photo = read_file(photo_path, _IMAGE_REMEDY, MISSING_PHOTO)
                size = sizes.get(key) or image_size(photo, str(photo_path), _IMAGE_REMEDY)
                sizes[key] = size
                mask = read_file(mask_path, _MASK_REMEDY, MISSING_MASK)
                num_targets = entry.get("num_targets", 1)
                white = whiten_mask(mask, size, str(mask_path), _MASK_REMEDY, num_targets)
                whitened += white != mask
                writer.add_image(key, photo)
                texts = tuple(sentence["sent"] for sentence in entry["sentences"])
                sent_ids = tuple(sentence["sent_id"] for sentence in entry["sentences"])
                fields = key, image_id_of(key), entry["cat"], *size, white, texts, sent_ids
                writer.add_ref(RefRecord(number, *fields, num_targets))
        odd.settle()
        earlier: Counter[str] = Counter()  # those of no split are in several files
        for path_of_list in (p.with_suffix(".odd") for p in args.json):
            if path_of_list.is_file():
                earlier |= Counter(path_of_list.read_text("utf-8").split("\n"))
        writer.left_out = earlier.total() + len(odd.of_split(split))
    _note_whitened(whitened, len(entries))
    return path


def read_entries(paths: Sequence[Path], odd: OddRecords) -> list[tuple[int, Entry]]:
    """Read the JSON of one split, or of several that are packed as one.

    Returns:
        The entries, each with its place among all, but for those that `odd` takes note of: they
        cannot be packed, or their numbers were there before.
    Raises:
        UserError: a file is missing or broken.
    """
    items = [
        (f"{path}[{i}]", item)
        for path in paths
        for i, item in enumerate(read_as(_LIST, read_file(path, _REDO), str(path), _REDO))
    ]
    split = "+".join(path.stem for path in paths)
    entries: list[tuple[int, Entry]] = []
    seen: set[str] = set()
    for place, (where, item) in enumerate(items):
        with odd.catch("malformed entry", split, place):
            entry = read_as(_ENTRY, item, where, _REDO)
            numbers = [f"sent_id {sentence['sent_id']}" for sentence in entry["sentences"]]
            numbers.append(f"segment_id {entry['segment_id']}")
            refuse_seen(seen, numbers, where, f"{_REDO}, or pack each JSON file alone")
            entries.append((place, entry))
    return entries


def whiten_mask(
    data: bytes, size: tuple[int, int], name: str, remedy: str, num_targets: int = 1
) -> bytes:
    """Return a mask's file in which the object is 253 to 255, as the release writes them.

    A file that is so stays as it is; any other code becomes 255.

    Raises:
        UserError: it cannot be decoded, is not of its image's size, or is empty though it has
            targets, or the other way round.
    """
    codes = read_mask(data, name, remedy)
    check_mask(codes, size, name, remedy, num_targets)
    white = np.where((codes == 0) | (codes >= 253) & (codes <= 255), codes, 255).astype(np.uint8)
    is_white = np.array_equal(decode(data, cv2.IMREAD_GRAYSCALE, name, remedy), white)
    return data if is_white else encode_mask(white)


def _note_whitened(count: int, total: int) -> None:
    """Say how many masks `whiten_mask` has changed."""
    if count:
        print(f"note: {count} of {total} masks are not of 0 and 253 to 255: made so, object 255")


def check_mask(
    mask: np.ndarray, size: tuple[int, int], name: str, remedy: str, num_targets: int = 1
) -> None:
    """Raise a `UserError` if a mask (H, W) is not of its image's size, or does not fit its targets.

    A mask is empty if and only if it has no target.
    """
    if mask.shape != size:
        turned = " (turned by its EXIF orientation?)" if mask.shape == size[::-1] else ""
        sizes = f"{mask.shape[0]} x {mask.shape[1]} pixels, its image {size[0]} x {size[1]}"
        raise OddError("mask of another size", f"{name} is {sizes}{turned}: {remedy}")
    if num_targets and not mask.any():
        raise OddError(EMPTY, f"{name} is an empty mask: {remedy}")
    if not num_targets and mask.any():
        reason = "is not empty, though num_targets is 0"
        raise OddError("mask of no target", f"{name} {reason}: {remedy}")


def find_photo(folder: Path, key: str) -> Path:
    """Return an image's path in a folder, under COCO's name of 2017 if that alone is there."""
    path = folder / key
    renamed = path.with_name(re.sub(r"^COCO_(train|val)2014_(?=\d{12}\.jpg$)", "", path.name))
    return renamed if os.path.isfile(renamed) and not os.path.isfile(path) else path


def image_id_of(image_key: str) -> int | None:
    """Return the number in a name that COCO gives; None in any other, such as a clip's frame."""
    name = re.fullmatch(
        r"(?:.*/)?COCO_[^/]*_(\d{12})\.\w+|(?:(?:.*/)?(?:train|val|test)20\d\d/)?(\d{12})\.jpg",
        image_key,
    )
    return int(name[1] or name[2]) if name else None


def image_size(data: bytes, name: str, remedy: str) -> tuple[int, int]:
    """Return an image file's (height, width); all of it is decoded, to be sure that it can be."""
    return decode(data, cv2.IMREAD_COLOR, name, remedy).shape[:2]


# ------------------------------------------------------------------- from the release's own pickles


def convert(args: argparse.Namespace) -> Path:
    """Convert an LMDB of the release, and return the new one's path.

    The release keeps no ids of sentences: they are counted from 0 in the order of the file.
    """
    source = args.from_lmdb
    dataset = args.dataset or source.resolve().parent.name
    path = args.output_dir / f"{source.stem}.lmdb"
    if path.resolve() == source.resolve():
        raise UserError(f"{path} is the file to convert: give another folder as -o")
    sizes: dict[str, tuple[int, int]] = {}
    digests: dict[str, bytes] = {}  # of images
    seen: set[str] = set()
    count = whitened = 0  # sentences, masks
    odd = OddRecords(args.skip_odd)
    with RecordWriter.open(path, dataset, source.stem) as writer:
        items = enumerate(release_items(source))
        for place, data in tqdm(items, desc=str(source), unit="ref", disable=None):
            where = f"{source}: entry {place}"
            with odd.catch("unreadable entry", source.stem, place):
                item = read_as(_RELEASE_ITEM, _unpickle(data, where), where, REPACK)
                key, number, texts = item["img_name"], item["seg_id"], tuple(item["sents"])
                size = sizes.get(key) or image_size(item["img"], f"{where}, image {key}", REPACK)
                digest = hashlib.sha256(item["img"]).digest()
                if digests.setdefault(key, digest) != digest:
                    raise UserError(f"{where} has another image {key} than an earlier: {REPACK}")
                mask = whiten_mask(item["mask"], size, f"{where}, mask", REPACK)
                refuse_seen(seen, [f"seg_id {number}"], where, REPACK)
                whitened += mask != item["mask"]
                sizes[key] = size
                writer.add_image(key, item["img"])
                sent_ids = tuple(range(count, count + len(texts)))
                fields = key, image_id_of(key), item["cat"], *size, mask, texts, sent_ids
                writer.add_ref(RefRecord(number, *fields))
                count += len(texts)
        odd.settle()
        writer.left_out = len(odd.of_split(source.stem))
    _note_whitened(whitened, len(seen))
    print(f"sentence ids: 0 to {count - 1} in the order of {source}, which has none")
    return path


def release_items(path: Path) -> Iterator[bytes | None]:
    """Yield the pickled items of an LMDB of the release in their order.

    Raises:
        UserError: it is no LMDB of the release.
    """
    with open_lmdb(path / "data.mdb" if path.is_dir() else path).begin() as txn:
        if txn.get(META_KEY) is not None:
            raise UserError(f"{path} is in this repository's format already: use it as it is")
        if txn.get(RELEASE_KEY) is None:
            raise UserError(f"{path} is no LMDB of the release: {REPACK}")
        count = _unpickle(txn.get(b"__len__"), f"{path}: __len__")
        for number in range(read_as(TypeAdapter(int), count, f"{path}: __len__", REPACK)):
            yield txn.get(b"%d" % number)


def _unpickle(data: bytes | None, where: str) -> object:
    if data is None:
        raise UserError(f"{where} is missing: {REPACK}")
    if data[:1] != b"\x80":  # how every pickle begins since protocol 2
        reason = "is no pickle; written with pyarrow.serialize, it cannot be read any more"
        raise UserError(f"{where} {reason}: {REPACK}")
    return load_plain(data, where)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = text_parser(__doc__, EPILOG)
    add = parser.add_argument
    several = "anns/<dataset>/<split>.json; several are packed as one split, <a>+<b>"
    add("-j", "--json", type=Path, nargs="+", help=several)
    add("-i", "--images", "--img-dir", dest="img_dir", type=Path, help="folder of the images")
    add("-m", "--mask-dir", type=Path, help="folder of the masks")
    old = "convert an LMDB that the release pickled, instead of -j, -i and -m"
    add("--from-lmdb", type=Path, metavar="OLD.lmdb", help=old)
    add("-o", "--output-dir", type=Path, required=True, help="folder for <split>.lmdb")
    add("--skip-odd", action="store_true", help="leave out refs that cannot be packed")
    add("--dataset", help="name stored in the file (that of the folder of the JSON or old LMDB)")
    args = parser.parse_args(argv)
    given = [args.json, args.img_dir, args.mask_dir]
    if any(given) if args.from_lmdb else not all(given):
        parser.error("give -j, -i and -m, or --from-lmdb alone")
    return args


if __name__ == "__main__":
    run_entry_point(main)
