"""tools/rescore.py: saved masks under the conventions of several papers."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import all_refs, read_jsonl, repack, user_error, write_any_number, write_result
from pycocotools import mask as coco_mask

from tools import rescore
from utils.errors import UserError
from utils.records import RecordReader
from utils.transforms import load_mask


@pytest.fixture(scope="module")
def saved(tmp_path_factory, shapes_lmdb) -> tuple[Path, Path]:
    """Predictions of records with one target a sentence, and the records."""
    return write_result(tmp_path_factory.mktemp("saved") / "run", shapes_lmdb), shapes_lmdb


def score(path: Path, lmdb: Path, *args: object) -> dict[str, dict]:
    """Return the scores that its table shows, unrounded."""
    parsed = rescore._parse_args([str(arg) for arg in (path, lmdb, *args)])
    return rescore.rescore(parsed, RecordReader(lmdb))


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def result_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def test_our_own_predictions_score_as_cris_what_the_test_said_to_the_last_digit(saved, capsys):
    path, lmdb = saved
    (scores,) = score(path, lmdb, "--as", "cris").values()
    assert scores == {name: result_of(path)[name] for name in scores}
    rescore.main([str(path), str(lmdb)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shapes train: 71 sentences, in per cent"
    assert "N-acc (none: under 50 pixels)" in lines[1]
    cris = next(line for line in lines if line.startswith("cris"))
    assert "CRIS, ETRIS" in cris
    assert f" {100 * scores['mIoU']:.2f} " in cris
    assert sum("approximation" in line for line in lines) == 1


@pytest.mark.parametrize("pixels", [1, 50])
def test_our_own_predictions_about_nothing_score_as_gres_what_the_test_said(
    tmp_path, shapes_lmdb, capsys, pixels
):
    lmdb = write_any_number(shapes_lmdb, tmp_path / "any.lmdb")
    path = write_result(tmp_path / "run", lmdb, no_target_pixels=pixels)
    (scores,) = score(path, lmdb, "--as", "gres", "--no-target-pixels", pixels).values()
    assert scores == {name: result_of(path)[name] for name in scores}
    rescore.main([str(path), str(lmdb)])
    assert ("were emptied before saving" in capsys.readouterr().out) is (pixels > 1)
    assert scores["N-acc"] == 1  # a mask moved aside is empty where the mask is


def test_lavt_squashes_both_masks_and_counts_from_the_threshold_on(saved):
    path, lmdb = saved
    reader, ious, total = RecordReader(lmdb), [], np.zeros(2)
    lines = {line["sent_id"]: line for line in read_jsonl(path)}
    for i in range(len(reader)):
        ref = reader.ref(i)
        for sent_id in ref.sent_ids:
            masks = coco_mask.decode(lines[sent_id]["pred_rle"]), np.uint8(load_mask(ref) > 0)
            a, b = (cv2.resize(m, (480, 480), None, 0, 0, cv2.INTER_NEAREST_EXACT) for m in masks)
            counts = (a & b).sum(), (a | b).sum()
            ious.append(counts[0] / counts[1])
            total += counts
    (scores,) = score(path, lmdb, "--as", "lavt").values()
    assert scores["mIoU"] == pytest.approx(np.mean(ious))
    assert scores["oIoU"] == pytest.approx(total[0] / total[1])
    assert scores["Pr@0.7"] == np.mean(np.array(ious) >= 0.7)
    assert abs(scores["mIoU"] - result_of(path)["mIoU"]) > 1e-6


def test_anybodys_lines_in_any_order_do_with_either_kind_of_run_lengths(saved, tmp_path):
    path, lmdb = saved
    lines = []
    for line in read_jsonl(path)[::-1]:
        columns = coco_mask.decode(line["pred_rle"]).T.reshape(-1)  # runs begin with background
        edges = np.flatnonzero(np.diff(columns, prepend=0))
        runs = np.diff([0, *edges, len(columns)]).tolist()
        rle = {"size": line["pred_rle"]["size"], "counts": runs}
        lines.append({"sent_id": line["sent_id"], "segmentation": rle, "score": 0.5})
    assert score(write(tmp_path / "a.jsonl", lines), lmdb) == score(path, lmdb)


def changed(**values: object):
    return lambda lines: [lines[0] | values, *lines[1:]]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda lines: lines[1:], "train.lmdb has sent_id 0, {path} has not: 1 such in all"),
        (changed(sent_id=-7), "{path} has sent_id -7, "),
        (lambda lines: [*lines, lines[3]], "{path}:72: sent_id "),
        (changed(pred_rle={"size": [3, 4], "counts": [12]}), "sent_id 0 has a segmentation of 3 x"),
        (changed(pred_rle={"counts": "0"}), "sent_id 0 has an unreadable segmentation"),
        (changed(pred_rle=None), '{path}:1 is not {{"sent_id": 7, '),
        (changed(sent_id="1"), '{path}:1 is not {{"sent_id": 7, '),
        (lambda _: [], "train.lmdb has sent_id 0, {path} has not: 71 such in all"),
    ],
)
def test_predictions_that_do_not_fit_the_records_are_one_line(saved, tmp_path, edit, told):
    path = write(tmp_path / "p.jsonl", edit(read_jsonl(saved[0])))
    assert told.format(path=path) in user_error(rescore.main, [str(path), str(saved[1])])


def test_what_is_not_there_or_has_no_unique_sentences_is_named(saved, tmp_path):
    path, lmdb = saved
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        rescore.main([str(tmp_path / "no.jsonl"), str(lmdb)])
    twice = repack(lmdb, tmp_path / "twice.lmdb", [all_refs(lmdb)[0]] * 2)
    with pytest.raises(UserError, match=r"twice\.lmdb has a sent_id twice"):
        rescore.main([str(path), str(twice)])
