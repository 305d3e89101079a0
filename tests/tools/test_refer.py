"""tools/refer.py: refs and instances of a REFER folder, and what is refused."""

import collections
import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers import refer_instances, refer_ref, write_refer
from pycocotools import mask as coco_mask

from tools.refer import Refer, draw_segmentation, load_plain, load_refs
from utils.errors import UserError

SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]
OVERLAPPING = [4, 1, 8, 1, 8, 5, 4, 5]


def write(root: Path, *refs: dict, **changes: dict) -> Refer:
    """A folder of these refs, or of one, with odd instances."""
    refs = list(refs) or [refer_ref(1)]
    return Refer(write_refer(root, refs, refer_instances(refs, **changes)), "toys", "me")


def draw(root: Path, segmentation: object) -> np.ndarray:
    return write(root, annotations={101: {"segmentation": segmentation}}).mask(refer_ref(1))


# -- the pickle ----------------------------------------------------------------------------------

PYTHON_2_PROTOCOL_0 = (
    b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'ref_id'\np4\nI5\ns"
    b"S'raw'\np5\nS'caf\\xe9'\np6\nsS'big'\nL12L\nsS'uni'\nVcaf\\u00e9\nsa."
)
PYTHON_2_PROTOCOL_2 = (
    b"\x80\x02]q\x00}q\x01(U\x04sentq\x02U\x05caf\xc3\xa9q\x03U\x06ref_idq\x04K\x05"
    b"U\x03rawq\x05U\x04caf\xe9q\x06U\x03big\x8a\x01\x0cU\x03uniX\x05\x00\x00\x00caf\xc3\xa9ua."
)


@pytest.mark.parametrize("data", [PYTHON_2_PROTOCOL_0, PYTHON_2_PROTOCOL_2], ids=["p0", "p2"])
def test_python_2_byte_strings_become_text_by_utf8(data: bytes) -> None:
    ref = {"sent": "café", "ref_id": 5, "raw": "caf\udce9", "big": 12, "uni": "café"}
    assert load_plain(data, "x.p") == [ref]


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_plain_containers_are_read_in_every_protocol(protocol: int) -> None:
    refs = [{"a": [1, 2.5, None, True], "b": ("é", {"c": -(2**70)})}]
    assert load_plain(pickle.dumps(refs, protocol), "x.p") == refs


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"cos\nsystem\n(S'touch ran'\ntR.", "os.system"),
        (b"(S'touch ran'\nios\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.", "os.system"),
        (pickle.dumps([collections.OrderedDict()]), "collections.OrderedDict"),
        (pickle.dumps([np.int64(3)]), "numpy"),
        (pickle.dumps([{1}], 2), "set"),
    ],
)
def test_a_pickle_that_asks_for_any_name_is_refused_and_does_not_run_it(
    tmp_path: Path, monkeypatch, data: bytes, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"x\.p asks for .*{name}"):
        load_plain(data, "x.p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a readable pickle"),
        (b"<html><body>404</body></html>", "not a readable pickle"),
        (PYTHON_2_PROTOCOL_2[:-30], "not a readable pickle, or cut off"),
        (b"\x80\x02]q\x00Pperson\na.", "not a readable pickle"),
        (pickle.dumps({"a": 1}), "must be a valid list"),
        (pickle.dumps([1, 2]), "must be a valid dictionary"),
        (pickle.dumps([]), "must be one or more refs"),
    ],
)
def test_a_broken_pickle_is_refused_with_its_name(tmp_path: Path, data, message: str) -> None:
    (tmp_path / "x.p").write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.p.* {message}"):
        load_refs(tmp_path / "x.p")


def test_shared_lists_are_told_briefly(tmp_path: Path) -> None:
    shared = ["x"]
    for _ in range(10):
        shared = [shared] * 10
    shared.append(shared)
    message = r"sentences\[0\]: must be a valid dictionary, not \[\[\["
    with pytest.raises(UserError, match=message) as caught:
        write(tmp_path, refer_ref(1, more=shared, sentences=[shared]))
    assert len(str(caught.value)) < 400


# -- the folder ----------------------------------------------------------------------------------


def test_splits_are_matched_as_refer_does(tmp_path: Path) -> None:
    names = ["train", "val", "testA", "testB", "testAB", "testC", "testBC"]
    refer = write(tmp_path, *(refer_ref(i, name) for i, name in enumerate(names)))

    def found(split: str) -> list[str]:
        return [r["split"] for r in refer.split_refs(split)]

    assert refer.split_names() == names
    assert found("train") == ["train"]
    assert found("val") == ["val"]
    assert found("testA") == ["testA", "testAB"]
    assert found("testB") == ["testB", "testAB", "testBC"]
    assert found("testC") == ["testC", "testBC"]
    assert found("test") == names[2:]
    assert found("tes") == []


@pytest.mark.parametrize(
    ("ids", "categories"),
    [([1, 11, 13, 90], [0, 10, 11, 79]), ([276, -1, 12], [2, 0, 1])],
    ids=["COCO's: 0 to 79", "others: in the order of their ids"],
)
def test_categories_count_from_0(tmp_path: Path, ids, categories) -> None:
    refs = [refer_ref(i, category_id=category) for i, category in enumerate(ids)]
    refer = write(tmp_path, *refs)
    assert [refer.category(r) for r in refs] == categories


@pytest.mark.parametrize("part", [[2, 3, 7, 3], [2, 3, 7, 6], [4, 4], [1, 2, 3, 4, 5]])
def test_a_line_beside_a_polygon_is_drawn_as_pycocotools_draws_it(part: list) -> None:
    polygon = [1, 1, 6, 1, 6, 6, 1, 6]
    runs = coco_mask.frPyObjects([polygon, part], 8, 10)
    drawn = draw_segmentation([polygon, part], 8, 10)
    assert np.array_equal(drawn, coco_mask.decode(runs).sum(2).astype(np.uint8) * 255)


def test_overlapping_polygons_are_254_and_the_rest_255(tmp_path: Path) -> None:
    expected = np.zeros((8, 10), np.uint8)
    expected[1:5, 2:8] = 255
    expected[1:5, 4:6] = 254
    mask = draw(tmp_path, [SQUARE, OVERLAPPING])
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("as_list", [False, True])
def test_run_length_masks_are_read(tmp_path: Path, as_list: bool) -> None:
    runs = {"size": [8, 10], "counts": [17, 4, 4, 4, 51]}  # down the columns: x 2-3, y 1-4
    expected = np.zeros((8, 10), np.uint8)
    expected[1:5, 2:4] = 255
    np.testing.assert_array_equal(draw(tmp_path, [runs] if as_list else runs), expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "has no segmentation .*: correct it, or unpack the folder .*toys again"),
        (None, "has no segmentation"),
        ({"size": [8, 10]}, "has an unreadable segmentation"),
        ("polygon", "has an unreadable segmentation"),
        ({"size": [4, 4], "counts": [0, 16]}, "of 4 x 4 pixels on an image of 8 x 10"),
        ([[-9, -9, -8, -9, -8, -8]], "covers no pixel"),
        ({"size": [8, 10], "counts": [9, 9]}, "runs do not fill its image of 8 x 10"),
        ({"size": [8, 10], "counts": "99"}, "runs do not fill"),
        ({"size": [8, 10], "counts": ""}, "runs do not fill"),
        ({"size": [8, 10], "counts": [9, 90]}, "has an unreadable segmentation"),
        ({"size": [8, 10], "counts": "é~"}, "has an unreadable segmentation"),
        ({"size": [8, 10], "counts": [0.5, 79.5]}, "its runs are no whole numbers"),
        ({"size": [8, 10], "counts": [-1, 81]}, "its runs are no whole numbers"),
        ([[1e9, 1e9, 2e9, 3e9, 4e9, 1]], "pairs of numbers x, y near its image of 8 x 10"),
        ([[1, 1, 5, 5]], "a polygon is three or more pairs of numbers"),
        ([[1, 1, 5, 1, 5, float("nan")]], "a polygon is three or more pairs of numbers"),
    ],
)
def test_a_useless_segmentation_is_refused(tmp_path: Path, segmentation, message: str) -> None:
    with pytest.raises(UserError, match=rf"annotation 101 \(ref 1\) .*{message}"):
        draw(tmp_path, segmentation)


def test_an_annotation_image_or_category_that_is_missing_is_named(tmp_path: Path) -> None:
    refer = write(tmp_path)
    for kind, look_up, changes in (
        ("annotation", refer.annotations, {"ann_id": 999}),
        ("image", refer.image, {"image_id": 999}),
        ("category", refer.category, {"category_id": 999}),
    ):
        with pytest.raises(UserError, match=rf"instances\.json has no {kind} 999, which ref 1"):
            look_up(refer_ref(1, **changes))


def test_a_missing_folder_or_split_by_names_what_is_there(tmp_path: Path) -> None:
    root = write_refer(tmp_path / "root", [refer_ref(1)])
    for where, message in (
        ((root, "toys", "umd"), r"toys/refs\(umd\)\.p does not exist; found .*refs\(me\)\.p"),
        ((root, "refcoco", "me"), r"refcoco/refs.* does not exist; found .*toys/refs\(me\)"),
        ((tmp_path / "nowhere", "toys", "me"), "does not exist; found no such file in .*nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            Refer(*where)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": None}, r"\[1\].split: must be a valid string, not None"),
        ({"ann_id": "12"}, r"\[1\].ann_id: must be a whole number, or a list of them, not '12'"),
        ({"ann_id": [True]}, r"\[1\].ann_id: must be a whole number"),
        ({"sentences": []}, r"\[1\].sentences: must be one or more"),
        ({"sentences": [{"sent_id": 3}]}, r"\[1\].sentences\[0\].sent: is missing"),
        ({"sentences": [{"sent": "\ud800", "sent_id": 3}]}, r"sent: must be .* unicode string"),
        ({"sentences": [{"sent": "mug", "sent_id": 2**63}]}, r"sent_id: must be less than"),
        ({"ref_id": 1}, "ref_id 1 is there twice"),
        *(
            ({"split": split}, r"\[1\].split: must be a plain name")
            for split in ("../../elsewhere", "..", "", ".", "a\0b", "a\nb", "a\\b", "x" * 300)
        ),
    ],
)
def test_a_malformed_ref_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path, refer_ref(1), refer_ref(2) | changes)


def read_all(refer: Refer) -> None:
    for ref in refer.refs:
        refer.annotations(ref), refer.image(ref)


@pytest.mark.parametrize("odd", [{"id": 5}, {"bbox": None}, {"id": "x"}, 3, None])
def test_what_no_ref_names_may_be_of_any_kind(tmp_path: Path, odd: object) -> None:
    refs = [refer_ref(1)]
    content = refer_instances(refs)
    for kind in ("images", "annotations"):
        content[kind].insert(0, odd)
    read_all(Refer(write_refer(tmp_path, refs, content), "toys", "me"))


def test_broken_instances_are_refused(tmp_path: Path) -> None:
    path = write_refer(tmp_path, [refer_ref(1)]) / "toys" / "instances.json"
    content = path.read_text()
    for text, message in (
        (content[:50], "is not readable JSON"),
        ("[]", "must be a valid dictionary"),
        ("{}", "images: is missing"),
        (content.replace('"bbox"', '"box"'), r"annotation 101.bbox: is missing"),
        (content.replace(", 4.9]", "]"), r"annotation 101.bbox: must be x, y, width, height"),
        (content.replace(", 4.9]", ", null]"), r"annotation 101.bbox\[3\]: must be a valid number"),
        (content.replace("a_7.jpg", "x" * 501), "file_name: must be a path of at most 500 bytes"),
        (content.replace('"height": 8', '"height": null'), "image 7.height: must be .*, not None"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"instances\.json.*{message}"):
            read_all(Refer(tmp_path, "toys", "me"))
    path.unlink()
    with pytest.raises(UserError, match=r"instances\.json does not exist: correct it"):
        Refer(tmp_path, "toys", "me")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_runs_are_read_as_coco_writes_them(share: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 90, 2).tolist()
        mask = rng.random((height, width)) < share
        mask[0, 0] = True
        rle = coco_mask.encode(np.asfortranarray(mask))
        for counts in (rle["counts"], rle["counts"].decode()):
            drawn = draw_segmentation({**rle, "counts": counts}, height, width)
            assert np.array_equal(drawn > 0, mask)
