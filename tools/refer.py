"""Read a REFER folder: refs(<split-by>).p with the sentences, instances.json with the objects.

The pickle comes from the web, so it is read by an unpickler that knows plain containers, strings
and numbers, and refuses everything else before any of it runs.
"""

import codecs
import json
import pickle
import reprlib
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from pycocotools import mask as coco_mask

from utils.errors import UserError
from utils.files import is_plain_name

_REF_FIELDS = {
    "ref_id": int,
    "ann_id": int,
    "image_id": int,
    "category_id": int,
    "split": str,
    "sentences": list,
}
_SENTENCE_FIELDS = {"sent": str, "sent_id": int}
_INSTANCES_FIELDS = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {"id": int, "bbox": list},
    "categories": {"id": int},
}
_SHORT = reprlib.Repr()  # shared lists can be endless
_SHORT.maxlevel, _SHORT.maxstring = 2, 80

_COCO_IDS = frozenset(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


class Refer:
    """Holds a REFER folder with one way of splitting it.

    Args:
        data_root: the folder that holds the folder.
        dataset: the folder's name (refcoco, refcoco+, refcocog, refclef, or any other).
        split_by: what stands in brackets in refs(...).p (unc, umd, google, berkeley, ...).

    Attributes:
        refs: the refs in the order of the file: {ref_id, ann_id, image_id, category_id, split,
            sentences [{sent, sent_id, ...}], ...}.

    Raises:
        UserError: a folder or file is missing, cannot be read, or lacks a field.
    """

    def __init__(self, data_root: str | Path, dataset: str, split_by: str) -> None:
        folder = _dataset_folder(Path(data_root), dataset)
        self.refs_path = folder / f"refs({split_by}).p"
        self.instances_path = folder / "instances.json"
        if not self.refs_path.is_file():
            there = ", ".join(sorted(p.name[5:-3] for p in folder.glob("refs(*).p"))) or "none"
            raise UserError(f"{folder} has no {self.refs_path.name}; split-by there: {there}")
        self.refs = load_refs(self.refs_path)
        self._check_refs()
        self._images, self._annotations, category_ids = self._load_instances()
        ordered = sorted(_COCO_IDS if category_ids <= _COCO_IDS else category_ids)
        self._categories = {category_id: i for i, category_id in enumerate(ordered)}

    def split_names(self) -> list[str]:
        """Return the names that the refs give their splits, in the order of the file."""
        return list(dict.fromkeys(ref["split"] for ref in self.refs))

    def split_refs(self, split: str) -> list[dict]:
        """Return the refs of a split.

        testA, testB and testC go by their letter (a ref of "testAB" is in two of them), test
        takes every name with "test" in it, any other name is matched exactly.
        """
        return [ref for ref in self.refs if _is_in_split(ref["split"], split)]

    def annotation(self, ref: dict) -> dict:
        """Return the object of a ref: {bbox [x, y, w, h], segmentation, ...}.

        Raises:
            UserError: instances.json has no such object.
        """
        return self._look_up(self._annotations, "annotation", ref["ann_id"], ref)

    def image(self, ref: dict) -> dict:
        """Return the image of a ref: {file_name, height, width, ...}.

        Raises:
            UserError: instances.json has no such image.
        """
        return self._look_up(self._images, "image", ref["image_id"], ref)

    def category(self, ref: dict) -> int:
        """Return the ref's category from 0: 0-79 for COCO's, else its place among the ids.

        Raises:
            UserError: instances.json has no such category.
        """
        return self._look_up(self._categories, "category", ref["category_id"], ref)

    def mask(self, ref: dict) -> np.ndarray:
        """Draw a ref's object: (height, width) uint8, 0 outside, non-zero inside.

        Parts are summed in uint8 times 255 as in the release, so a pixel under two
        overlapping polygons is 254.

        Raises:
            UserError: there is no segmentation, or none that can be read, or it covers no pixel.
        """
        image = self.image(ref)
        segmentation = self.annotation(ref).get("segmentation")
        what = f"{self.instances_path}: annotation {ref['ann_id']} (ref {ref['ref_id']})"
        if not segmentation:
            raise UserError(f"{what} has no segmentation: {self._remedy()}")
        try:
            return draw_segmentation(segmentation, image["height"], image["width"])
        except UserError as error:
            raise UserError(f"{what} has {error}") from None

    def _check_refs(self) -> None:
        seen: set[int] = set()
        remedy = self._remedy()
        for number, ref in enumerate(self.refs):
            where = f"{self.refs_path}: ref number {number}"
            check_fields(ref, _REF_FIELDS, where, remedy)
            for sentence in ref["sentences"]:
                check_fields(sentence, _SENTENCE_FIELDS, f"{where}, a sentence", remedy)
            if not ref["sentences"]:
                raise UserError(f"{where} (ref_id {ref['ref_id']}) has no sentences: {remedy}")
            if not is_plain_name(ref["split"]):
                raise UserError(f"{where} has a split that is no plain name: {ref['split']!r:.80}")
            if ref["ref_id"] in seen:
                raise UserError(f"{where} has ref_id {ref['ref_id']}, as another ref has: {remedy}")
            seen.add(ref["ref_id"])

    def _load_instances(self) -> tuple[dict[int, dict], dict[int, dict], set[int]]:
        path = self.instances_path
        if not path.is_file():
            raise UserError(f"{path} does not exist: {self._remedy()}")
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not readable JSON ({error}): {self._remedy()}") from None
        check_fields(content, dict.fromkeys(_INSTANCES_FIELDS, list), str(path), self._remedy())
        for name, needs in _INSTANCES_FIELDS.items():
            for number, item in enumerate(content[name]):
                check_fields(item, needs, f"{path}: {name}[{number}]", self._remedy())
        images = {image["id"]: image for image in content["images"]}
        annotations = {item["id"]: item for item in content["annotations"]}
        return images, annotations, {item["id"] for item in content["categories"]}

    def _look_up(self, table: dict[int, Any], kind: str, key: int, ref: dict) -> Any:
        if key not in table:
            raise UserError(
                f"{self.instances_path} has no {kind} {key}, which ref {ref['ref_id']} of "
                f"{self.refs_path.name} names: {self._remedy()}"
            )
        return table[key]

    def _remedy(self) -> str:
        return f"unpack the folder {self.refs_path.parent} again from its REFER archive"


def load_refs(path: str | Path) -> list[dict]:
    """Read the list of refs in a pickle, running nothing that the file brings along.

    Raises:
        UserError: the file is no pickle, is cut off, asks for any class or function, or is not a
            list of dicts.
    """
    path = Path(path)
    with path.open("rb") as file:
        refs = load_plain(file, str(path))
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise UserError(f"{path} does not hold a list of refs")
    if not refs:
        raise UserError(f"{path} holds no refs")
    return refs


def load_plain(file: BinaryIO, where: str) -> Any:
    """Read a pickle of plain containers, strings and numbers, and nothing else.

    The byte strings that Python 2 wrote become str: UTF-8 where that is valid, else Latin-1.

    Raises:
        UserError: it is no pickle, is cut off, or asks for any class or function; the text names
            `where`.
    """
    try:
        return _PlainUnpickler(file, where).load()
    except UserError:
        raise
    except Exception as error:
        # A damaged pickle can fail with almost anything.
        raise UserError(f"{where} is not a readable pickle, or cut off ({error!r})") from None


def check_fields(item: Any, needs: dict[str, Any], where: str, remedy: str) -> None:
    """Refuse an item of a data file that is no mapping or lacks a field of the given type.

    Raises:
        UserError: "`where` has no field x: `remedy`", or the like.
    """
    if not isinstance(item, dict):
        raise UserError(f"{where} is {_SHORT.repr(item):.80}, not a mapping: {remedy}")
    for field, kind in needs.items():
        if field not in item:
            raise UserError(f"{where} has no field {field}: {remedy}")
        if not isinstance(item[field], kind):
            raise UserError(f"{where}: {field} cannot be {_SHORT.repr(item[field]):.80}: {remedy}")


def _decode_rest(error: UnicodeDecodeError) -> tuple[str, int]:
    """Decode what is no UTF-8, up to the end of the string, as Latin-1."""
    return error.object[error.start :].decode("latin-1"), len(error.object)


_LATIN_1 = "latin-1 where it is no UTF-8"


class _PlainUnpickler(pickle.Unpickler):
    """Reads the containers, strings and numbers that pickle has opcodes for, and no name."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        codecs.register_error(_LATIN_1, _decode_rest)
        super().__init__(file, encoding="utf-8", errors=_LATIN_1)
        self._where = where

    def find_class(self, module: str, name: str) -> NoReturn:
        raise UserError(
            f"{self._where} asks for {module}.{name}: refs are plain lists, dicts, strings and "
            "numbers, so this file is damaged or hostile and was not loaded"
        )


def _dataset_folder(data_root: Path, dataset: str) -> Path:
    folder = data_root / dataset
    if folder.is_dir():
        return folder
    if not data_root.is_dir():
        raise UserError(f"--data_root {data_root} does not exist; see tools/prepare_datasets.md")
    there = ", ".join(sorted({p.parent.name for p in data_root.glob("*/refs(*).p")})) or "none"
    raise UserError(f"{data_root} has no folder {dataset}; REFER folders there: {there}")


def _is_in_split(name: str, split: str) -> bool:
    if split in ("testA", "testB", "testC"):
        return split[-1] in name
    if split == "test":
        return "test" in name
    return name == split


def draw_segmentation(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Draw COCO's way of writing an object: (height, width) uint8, 0 outside, non-zero inside.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], a run-length mask {size, counts}, or a
            list of those.
        height, width: of the image, in pixels.

    Raises:
        UserError: it cannot be read, is of another size, or covers no pixel.
    """
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    try:
        masks = coco_mask.decode([_run_lengths(part, height, width) for part in parts])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"an unreadable segmentation ({error!r})") from None
    if not masks.any():
        raise UserError("a segmentation that covers no pixel")
    return masks.sum(axis=2).astype(np.uint8) * 255


def _run_lengths(part: list | dict, height: int, width: int) -> dict:
    """Return a polygon or a run-length mask as compressed run lengths, {size, counts}.

    pycocotools fills what short runs leave open with whatever is in memory, and far-away corners
    with all the memory there is, so neither gets that far.
    """
    if isinstance(part, list):
        if len(part) < 6 or len(part) % 2 or not np.isfinite(part).all():
            raise UserError(
                "an unreadable segmentation (a polygon is three or more pairs of finite numbers "
                f"x, y, not {part!r:.60})"
            )
        points = np.reshape(part, (-1, 2)) / (width, height)
        if np.abs(points).max() > 10:
            raise UserError(f"a polygon far outside its image of {height} x {width}: {part!r:.60}")
        return coco_mask.frPyObjects([part], height, width)[0]
    rows, columns = part["size"]
    if (rows, columns) != (height, width):
        raise UserError(
            f"a segmentation of {rows} x {columns} pixels on an image of {height} x {width}"
        )
    counts = part["counts"]
    if isinstance(counts, list):
        if not all(isinstance(run, int) and run >= 0 for run in counts):
            raise UserError("an unreadable segmentation (its runs are no whole numbers from 0)")
        counts = coco_mask.frPyObjects(part, height, width)["counts"]
    # Runs that fill the image are too long for one of a pixel less.
    if _fit(counts, height * width - 1) or not _fit(counts, height * width):
        raise UserError(f"a segmentation whose runs do not fill its image of {height} x {width}")
    return {"size": [height, width], "counts": counts}


def _fit(counts: str | bytes, pixels: int) -> bool:
    """Return whether compressed run lengths are not too long for a number of pixels."""
    try:
        coco_mask.decode({"size": [pixels, 1], "counts": counts})
    except ValueError:
        return False
    return True
