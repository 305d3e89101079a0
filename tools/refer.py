"""Read a REFER folder: refs(<split-by>).p with the sentences, instances.json with the objects.

gRefCOCO's grefs(<split-by>).json is of the same kind: there a ref has a list of objects, or none.

The pickle comes from the web, so it is read by an unpickler that knows plain containers, strings
and numbers, and refuses everything else before any of it runs.
"""

import io
import json
import pickle
import reprlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn, NotRequired, TypeVar

import numpy as np
from pycocotools import mask as coco_mask
from pydantic import AfterValidator, Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from tools.odd_records import EMPTY, OddError, OddRecords
from utils.errors import UserError
from utils.files import is_plain_name
from utils.records import LARGEST, LONGEST_KEY
from utils.tokenizer import has_words

T = TypeVar("T")

NO_TARGET = [-1]  # gRefCOCO's ann_id of a ref whose sentences are true of nothing in the image
_COCO_IDS = frozenset(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def must(holds: Callable[[Any], bool], what: str = "") -> AfterValidator:
    """Make a validator that refuses what `holds` is false for; the values must be `what`."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(what)
        return value

    return AfterValidator(check)


def _are_ids(value: Any) -> bool:
    return all(type(i) is int for i in (value if isinstance(value, list) else [value]))


def _is_key(text: str) -> bool:
    return "\0" not in text and len(text.encode()) <= LONGEST_KEY


_Ids = Annotated[Any, must(_are_ids, "a whole number, or a list of them")]
_SHORT_PATH = must(_is_key, f"a path of at most {LONGEST_KEY} bytes")
ImageKey = Annotated[str, Field(min_length=1), _SHORT_PATH]
Number = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
SplitName = Annotated[str, must(is_plain_name, "a plain name")]
# With a limit of its length, a text is refused that holds half a character (a lone surrogate).
Text = Annotated[str, Field(min_length=0), must(has_words, "a text with words")]


class Sentence(TypedDict):
    """Describe one sentence of a ref."""

    sent: Text
    sent_id: Number


Sentences = Annotated[list[Sentence], must(bool, "one or more")]


class Ref(TypedDict):
    """Describe one object that sentences denote, or a list of them."""

    ref_id: Number
    ann_id: _Ids
    image_id: int
    category_id: _Ids
    split: SplitName
    sentences: Sentences


class _Image(TypedDict):
    id: int
    file_name: ImageKey
    height: int
    width: int


class _Annotation(TypedDict):
    id: int
    bbox: Annotated[list[FiniteFloat], must(lambda box: len(box) == 4, "x, y, width, height")]
    segmentation: NotRequired[Any]
    iscrowd: NotRequired[Any]
    image_id: NotRequired[Any]


class _Category(TypedDict):
    id: int


class _Instances(TypedDict):
    images: list[Any]  # those that a ref names are checked when it is read
    annotations: list[Any]
    categories: list[_Category]


_REFS = TypeAdapter(Annotated[list[Any], must(bool, "one or more refs")])
_REF, _IMAGE, _ANNOTATION = map(TypeAdapter, (Ref, _Image, _Annotation))
_INSTANCES = TypeAdapter(_Instances)


class Refer:
    """Holds a REFER folder with one way of splitting it.

    Args:
        data_root, dataset: the folder is `data_root`/`dataset`.
        split_by: what stands in brackets in refs(...).p (unc, umd, google, berkeley, ...).
        odd: takes note of refs that cannot be read; without it the first is refused.

    Raises:
        UserError: a folder or file is missing, cannot be read, or lacks a field.
    """

    def __init__(
        self, data_root: str | Path, dataset: str, split_by: str, odd: OddRecords | None = None
    ) -> None:
        folder = Path(data_root, dataset)
        self.refs_path = find_refs(folder, split_by)
        self.instances_path = folder / "instances.json"
        if not self.refs_path.is_file():
            there = ", ".join(sorted(map(str, Path(data_root).glob("*/*refs(*).*"))))
            raise UserError(
                f"{self.refs_path} does not exist; found {there or 'no such file'} "
                f"in the folders of {data_root} (tools/prepare_datasets.md)"
            )
        self._remedy = f"correct it, or unpack the folder {folder} again from its REFER archive"
        self.refs = load_refs(self.refs_path, self._remedy, odd)  # in the order of the file
        content = read_file(self.instances_path, self._remedy)
        instances = read_as(_INSTANCES, content, str(self.instances_path), self._remedy)
        self._images = _by_id(instances["images"])
        self._annotations = _by_id(instances["annotations"])
        category_ids = {item["id"] for item in instances["categories"]}
        ordered = sorted(_COCO_IDS if category_ids <= _COCO_IDS else category_ids)
        self._categories = {category_id: i for i, category_id in enumerate(ordered)}

    def split_names(self) -> list[str]:
        """Return the names that the refs give their splits, in the order of the file."""
        return list(dict.fromkeys(ref["split"] for ref in self.refs))

    def split_refs(self, split: str) -> list[Ref]:
        """Return the refs of a split.

        testA, testB and testC go by their letter (a ref of "testAB" is in two of them), test
        takes every name with "test" in it, any other name is matched exactly. So are all names
        of gRefCOCO.
        """
        is_gref = self.refs_path.name.startswith("grefs")
        if not is_gref and split in ("test", "testA", "testB", "testC"):
            part = split.removeprefix("test") or split
            return [ref for ref in self.refs if part in ref["split"]]
        return [ref for ref in self.refs if ref["split"] == split]

    def annotations(self, ref: Ref) -> list[_Annotation]:
        """Return the objects of a ref, none if it has no target; crowds in a list do not count.

        Raises:
            OddError: instances.json lacks one, or has it on another image, only crowds are left, or
                -1 stands beside others.
        """
        ids, what = ref["ann_id"], f"{self.refs_path}: ref {ref['ref_id']}"
        if ids == NO_TARGET:
            return []
        if ids == [] or (isinstance(ids, list) and -1 in ids):
            reason = "[-1] alone means that it has no target"
            raise OddError("contradictory ann_id", f"{what} has ann_id {ids}: {reason}")
        found = [
            self._look_up(self._annotations, "annotation", number, ref, _ANNOTATION)
            for number in dict.fromkeys([ids] if isinstance(ids, int) else ids)
        ]
        for item in found:
            if item.get("image_id", ref["image_id"]) != ref["image_id"]:
                where = f"is on image {item['image_id']}, not on its image {ref['image_id']}"
                raise OddError("another image", f"{what}: annotation {item['id']} {where}")
        if isinstance(ids, int):
            return found
        if all(item.get("iscrowd") for item in found):
            raise OddError("only crowds", f"{what}: its annotations {ids} are all crowds")
        return [item for item in found if not item.get("iscrowd")]

    def image(self, ref: Ref) -> _Image:
        """Return the image of a ref; an `OddError` if instances.json has none."""
        return self._look_up(self._images, "image", ref["image_id"], ref, _IMAGE)

    def category(self, ref: Ref) -> int | None:
        """Return the ref's category from 0: 0-79 for COCO's, else its place among the ids.

        It is None if the ref's objects have several, or it has none.
        """
        ids = ref["category_id"]
        known = {
            self._look_up(self._categories, "category", number, ref)
            for number in ([ids] if isinstance(ids, int) else ids)
            if ids == number or number != -1
        }
        return known.pop() if len(known) == 1 else None

    def mask(self, ref: Ref, may_be_empty: bool = False) -> np.ndarray:
        """Draw a ref's object: (height, width) uint8, 0 outside, non-zero inside.

        Parts are summed in uint8 times 255 as in the release, so a pixel under two
        overlapping polygons is 254. Objects in a list are joined in 0 and 255, without their
        polygons of fewer than six numbers or of an odd number.

        Raises:
            OddError: there is no segmentation, or none that can be read, or it covers no pixel
                and may not.
        """
        image, ids, drawn = self.image(ref), ref["ann_id"], []
        size, annotations = (image["height"], image["width"]), self.annotations(ref)
        where, of_ref = f"{self.instances_path}: annotation", f"(ref {ref['ref_id']})"
        for item in annotations:
            parts = item.get("segmentation")
            if isinstance(ids, list) and isinstance(parts, list):
                parts = [part for part in parts if not isinstance(part, list) or _has_points(part)]
            try:
                drawn += [draw_segmentation(parts, *size)] if parts else []
            except UserError as error:
                kind = getattr(error, "kind", "unreadable segmentation")
                raise OddError(kind, f"{where} {item['id']} {of_ref} has {error}") from None
        if annotations and not drawn:
            reason = f"no segmentation (a polygon has three points or more): {self._remedy}"
            raise OddError("no segmentation", f"{where} {ids} {of_ref} has {reason}")
        mask = drawn[0] if isinstance(ids, int) else join_masks(drawn, size)
        if annotations and not (may_be_empty or mask.any()):
            reason = "covers no pixel: --empty says what that means"
            raise OddError(EMPTY, f"{where} {ids} {of_ref} {reason}")
        return mask

    def _look_up(
        self, table: dict, kind: str, key: int, ref: Ref, form: TypeAdapter | None = None
    ) -> Any:
        """Return an entry of instances.json, checked if a form is given."""
        if key not in table:
            named = f"which ref {ref['ref_id']} of {self.refs_path.name} names"
            what = f"{self.instances_path} has no {kind} {key}, {named}: {self._remedy}"
            raise OddError(f"missing {kind}", what)
        where = f"{self.instances_path}: {kind} {key}"
        return read_as(form, table[key], where, self._remedy) if form else table[key]


def find_refs(folder: Path, split_by: str) -> Path:
    """Return the file of a folder's refs; it may be missing."""
    names = f"refs({split_by}).p", f"grefs({split_by}).json", f"grefs({split_by}).p"
    names = names[1:] + names[:1] if folder.name == "grefcoco" else names
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def load_refs(
    path: Path, remedy: str = "make it again", odd: OddRecords | None = None
) -> list[Ref]:
    """Read the refs in a JSON file, or a pickle, running nothing that the file brings along.

    Args:
        odd: takes note of refs that cannot be read, and those sound are returned.
    Raises:
        UserError: the file cannot be loaded, or is not a list of refs with an id each.
    """
    content = path.read_bytes()
    content = content if path.suffix == ".json" else load_plain(content, str(path))
    refs: list[Ref] = []
    seen: set[str] = set()
    for place, item in enumerate(read_as(_REFS, content, str(path), remedy)):
        split = item.get("split") if isinstance(item, dict) else None
        with odd.catch("malformed ref", split, ~place) if odd else nullcontext():
            ref = read_as(_REF, item, f"{path}[{place}]", remedy)
            refuse_seen(seen, [f"ref_id {ref['ref_id']}"], str(path), remedy)
            refs.append(ref)
    return refs


def load_plain(data: bytes, where: str) -> Any:
    """Read a pickle of plain containers, strings and numbers, and nothing else.

    The byte strings that Python 2 wrote become str. What is no UTF-8 in them becomes lone
    surrogates, which `Text` refuses.

    Raises:
        UserError: it is no pickle, is cut off, or asks for any class or function; the text names
            `where`.
    """
    file = io.BytesIO(data)
    try:
        return _PlainUnpickler(file, encoding="utf-8", errors="surrogateescape").load()
    except UserError as error:
        raise UserError(f"{where} {error}") from None
    except Exception as error:  # a damaged pickle can fail with almost anything
        raise UserError(f"{where} is not a readable pickle, or cut off ({error!r})") from None


def read_file(path: Path, remedy: str, kind: str = "missing file") -> bytes:
    """Read a file; an `OddError` if that cannot be, of the kind if it is missing."""
    try:
        if path.is_file():
            return path.read_bytes()
    except OSError as error:
        raise OddError("unreadable file", f"{path}: {error.strerror}: {remedy}") from None
    raise OddError(kind, f"{path} does not exist: {remedy}")


def refuse_seen(seen: set[str], numbers: Sequence[str], where: str, remedy: str) -> None:
    """Add a record's numbers to those seen, all or, with an `OddError`, none: each is new."""
    for place, number in enumerate(numbers):
        if number in seen or number in numbers[:place]:
            raise OddError("number twice", f"{where}: {number} is there twice: {remedy}")
    seen.update(numbers)


def read_as(kind: TypeAdapter[T], data: Any, where: str, remedy: str) -> T:
    """Check plain containers, or a JSON file's bytes, and return them without unknown fields.

    Raises:
        UserError: "`where`[3].field: what it must be: `remedy`", of each field that is wrong.
    """
    try:
        # Pydantic's own reader of JSON would take half as much memory again.
        content = json.loads(data) if isinstance(data, bytes) else data
        return kind.validate_python(content, strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not readable JSON ({error}): {remedy}") from None
    told: dict[Any, str] = {}  # one a field
    for fault in faults:
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in fault["loc"])
        text = fault["msg"].replace("Input should", "must").replace("Value error,", "must be")
        text += f", not {reprlib.repr(fault['input']):.80}"  # shared lists can be endless
        text = {"missing": "is missing", "extra_forbidden": "is unknown"}.get(fault["type"], text)
        told.setdefault(fault["loc"][:1], f"{place}: {text}")
    raise UserError(f"{where}{'; '.join(told.values())}: {remedy}")


class _PlainUnpickler(pickle.Unpickler):
    """Reads the containers, strings and numbers that pickle has opcodes for, and no name."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise UserError(
            f"asks for {module}.{name}: refs are plain lists, dicts, strings and "
            "numbers, so this file is damaged or hostile and was not loaded"
        )


def _by_id(items: list) -> dict[int, dict]:
    """Return the items that have an id."""
    found = (item for item in items if isinstance(item, dict))
    return {item["id"]: item for item in found if isinstance(item.get("id"), int)}


def _has_points(polygon: list) -> bool:
    """Tell whether a polygon has three points or more, each of two numbers."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def join_masks(masks: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Join masks of a size (height, width): uint8, 255 where any of them is not 0."""
    return np.uint8(255) * np.any([np.zeros(size, bool), *masks], axis=0)


def draw_segmentation(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Draw COCO's way of writing an object: (height, width) uint8, 0 outside, non-zero inside.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], a run-length mask {size, counts}, or a
            list of those.
        height, width: of the image, in pixels.

    Raises:
        UserError: it cannot be read, or is of another size.
    """
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    # After a polygon, pycocotools draws nothing for a point or a line.
    parts = parts[:1] + [part for part in parts[1:] if not isinstance(part, list) or len(part) >= 6]
    try:
        masks = coco_mask.decode([_run_lengths(part, height, width) for part in parts])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"an unreadable segmentation ({error!r})") from None
    return masks.sum(axis=2).astype(np.uint8) * 255


def _run_lengths(part: list | dict, height: int, width: int) -> dict:
    """Return a polygon or a run-length mask as compressed run lengths, {size, counts}.

    pycocotools fills what short runs leave open with whatever is in memory, and far-away corners
    with all the memory there is, so neither gets that far.
    """
    if isinstance(part, list):
        points = np.reshape(part, (-1, 2)) if _has_points(part) else np.array(np.nan)
        if not (np.abs(points) <= (10 * width, 10 * height)).all():
            what = f"three or more pairs of numbers x, y near its image of {height} x {width}"
            raise UserError(f"an unreadable segmentation (a polygon is {what}, not {part!r:.60})")
        return coco_mask.frPyObjects([part], height, width)[0]
    rows, columns = part["size"]
    if (rows, columns) != (height, width):
        what = f"a segmentation of {rows} x {columns} pixels on an image of {height} x {width}"
        raise OddError("mask of another size", what)
    counts = part["counts"]
    if isinstance(counts, list):
        if not all(isinstance(run, int) and run >= 0 for run in counts):
            raise UserError("an unreadable segmentation (its runs are no whole numbers from 0)")
        counts = coco_mask.frPyObjects(part, height, width)["counts"]
    try:  # runs that fill the image are too long for one of a pixel less
        coco_mask.decode({"size": [height * width - 1, 1], "counts": counts})
    except ValueError:
        return {"size": [height, width], "counts": counts}
    raise UserError(f"a segmentation whose runs do not fill its image of {height} x {width}")
