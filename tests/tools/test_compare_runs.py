"""tools/compare_runs.py: what it prints, what it refuses, where it finds the photos."""

import json
import sys
from pathlib import Path

import pytest
from helpers import (
    read_jsonl,
    read_script,
    run_command,
    user_error,
    write_any_number,
    write_records,
    write_result,
)

from tools import compare_runs


@pytest.fixture(autouse=True)
def few_draws(monkeypatch) -> None:
    monkeypatch.setattr(compare_runs, "DRAWS", 200)


@pytest.fixture
def runs(tmp_path, shapes_lmdb) -> list[Path]:
    """Two models' results on the same records; the second is nearer to the truth."""
    pairs = [("worse", 9), ("better", 2)]
    return [write_result(tmp_path / name, shapes_lmdb, step=step) for name, step in pairs]


def main(*args: object) -> None:
    compare_runs.main([str(arg) for arg in args])


def error(*args: object) -> str:
    return user_error(main, *args)


def rewrite(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_result(path: Path, **values: object) -> None:
    """Rewrite some of the `.json` beside a `.jsonl`."""
    result = path.with_suffix(".json")
    result.write_text(json.dumps(json.loads(result.read_text()) | values))


def test_it_prints_scores_difference_interval_and_who_won(runs, tmp_path, capsys):
    main(*runs, "-o", tmp_path / "page", "--margin", "0.05")
    lines = capsys.readouterr().out.splitlines()
    first, second = map(read_jsonl, runs)
    differences = [100 * (b["iou"] - a["iou"]) for a, b in zip(first, second, strict=True)]
    assert lines[0] == "shapes train: 71 sentences on 12 photos, in per cent"
    table = {line[:18].strip(): line[18:].split() for line in lines[1:7]}
    assert list(table) == ["", "A: worse", "B: better", "B − A", "95 % interval from", "to"]
    means = [100 * sum(line["iou"] for line in x) / len(x) for x in (first, second)]
    assert table["A: worse"][0] == f"{means[0]:.2f}"
    assert table["B: better"][0] == f"{means[1]:.2f}"
    difference = float(table["B − A"][0])
    assert difference == pytest.approx(sum(differences) / len(differences), abs=0.006)
    assert float(table["95 % interval from"][0]) < difference < float(table["to"][0])
    won, lost = (sum(sign * d > 5 for d in differences) for sign in (1, -1))
    tied = len(differences) - won - lost
    assert lines[7] == f"B won {won}, lost {lost}, tied {tied} (IoU within 0.05)"
    assert won > lost > 0 < tied


def test_the_page_beside_the_second_has_both_predictions_of_every_sentence(runs):
    main(*runs)
    folder = runs[1].parent / "comparison_worse_better"
    data, masks = read_script(folder / "data.js"), read_script(folder / "masks.js")
    for m, lines in enumerate(map(read_jsonl, runs)):
        assert data["rows"]["iou"][m] == [line["iou"] for line in lines]
        assert masks["predictions"][m] == [line["pred_rle"]["counts"] for line in lines]
    assert [model["name"] for model in data["models"]] == ["worse", "better"]
    numbers = data["comparison"]
    assert numbers["won"] + numbers["lost"] + numbers["tied"] == data["sentences"]
    assert (folder / "index.html").is_file()
    for photo in data["photos"]:
        assert (folder / data["photos_folder"] / photo[0]).is_file()


def test_intervals_hang_on_the_seed_and_not_on_the_order_of_the_lines(runs, tmp_path, capsys):
    texts = []
    for seed in (0, 0, 0, 1):
        main(*runs, "-o", tmp_path / "page", "--seed", seed)
        texts.append(capsys.readouterr().out)
        rewrite(runs[1], read_jsonl(runs[1])[::-1])
    assert texts[0] == texts[1] == texts[2] != texts[3]
    data = read_script(tmp_path / "page/data.js")
    assert data["rows"]["sentence"] == [line["sentence"] for line in read_jsonl(runs[0])]


def test_other_sentences_are_refused_and_named(runs, tmp_path):
    rewrite(runs[1], read_jsonl(runs[1])[2:])
    line = error(*runs, "-o", tmp_path / "page")
    assert f"not the same sentences: 2 of {runs[0]} are not in {runs[1]}, such as ref 100" in line
    line = error(*runs[::-1], "-o", tmp_path / "page")
    assert f"2 of {runs[0]} are not in {runs[1]}" in line
    assert not (tmp_path / "page").exists()


def test_other_records_under_the_same_ids_and_a_sentence_twice_are_refused(runs):
    head, *rest = read_jsonl(runs[1])
    for name, value in (("sentence", "a cat"), ("image", "b.jpg"), ("target_area", 1)):
        rewrite(runs[1], [head | {name: value}, *rest])
        assert f"has {name} " in error(*runs)
    rewrite(runs[1], [head, *rest, head])
    assert "has ref 100, sentence 0 (“red thing 0 0”) twice" in error(*runs)


def test_other_data_are_refused_and_other_protocols_unless_that_is_meant(runs, tmp_path):
    for name in ("split", "dataset"):
        change_result(runs[0], **{name: "other"})
        assert f"has {name} other" in error(*runs, "--any-protocol")
    change_result(runs[0], dataset="shapes", split="train")
    for changes in ({"swapped_sentences": True}, {"threshold": 0.5}, {"protocol": "aligned"}):
        change_result(runs[0], **changes)
        message = error(*runs)
        assert f"has {next(iter(changes))} " in message
        assert message.endswith("do not compare; if that is meant, add --any-protocol")
    main(*runs, "-o", tmp_path / "page", "--any-protocol")
    assert (tmp_path / "page/index.html").is_file()


def test_models_of_sentences_about_nothing_compare_under_one_rule(tmp_path, shapes_lmdb, capsys):
    lmdb = write_any_number(shapes_lmdb, tmp_path / "train.lmdb")
    paths = [write_result(tmp_path / name, lmdb, step=n) for name, n in (("a", 9), ("b", 2))]
    main(*paths, "-o", tmp_path / "page")
    names = capsys.readouterr().out.splitlines()[1].split()
    assert names == ["gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"]
    assert read_script(tmp_path / "page/data.js")["metrics"] == names
    change_result(paths[1], no_target_pixels=1)
    assert "has no_target_pixels 50" in error(*paths)


def test_two_results_of_one_run_are_told_apart_by_protocol(tmp_path, shapes_lmdb, capsys):
    write_result(tmp_path / "run", shapes_lmdb, "both")
    stem = tmp_path / "run/test_shapes_train"
    main(f"{stem}.jsonl", f"{stem}.aligned.jsonl", "--any-protocol", "-o", tmp_path / "page")
    output = capsys.readouterr().out
    assert "A: published" in output
    assert "B: aligned" in output
    main(f"{stem}.jsonl", f"{stem}.jsonl", "-o", tmp_path / "page")
    assert "tied 71" in capsys.readouterr().out


def test_the_records_can_be_named_where_they_moved(runs, tmp_path, shapes_lmdb):
    for path in runs:
        change_result(path, lmdb="gone.lmdb")
    missing = "the photos are not in gone.lmdb: name the LMDB with --lmdb"
    assert error(*runs, "-o", tmp_path / "page") == missing
    main(*runs, "-o", tmp_path / "page", "--lmdb", shapes_lmdb)
    assert (tmp_path / "page/index.html").is_file()
    assert "not in absent.lmdb" in error(*runs, "--lmdb", "absent.lmdb")
    other = write_records(tmp_path / "other.lmdb", [1])
    assert "holds other records than were scored" in error(*runs, "--lmdb", other)


def test_a_file_that_is_no_result_is_refused(runs):
    head = read_jsonl(runs[0])[0]
    wrong = [("sent_id", "a"), ("iou", "abc"), ("intersection", None), ("pred_rle", "1")]
    for text, complaint in (
        ("", "has no sentences"),
        ("{\n", ":1 is no JSON"),
        ("[]\n", ":1 has no usable ref_id"),
        ("{}\n", ":1 has no usable ref_id"),
        *((json.dumps(head | {name: value}), f":1 has no usable {name}") for name, value in wrong),
    ):
        runs[0].write_text(text)
        assert complaint in error(*runs)


def test_what_lies_beside_must_be_there_and_whole(runs):
    beside = runs[0].with_suffix(".json")
    content = json.loads(beside.read_text())
    beside.write_text("{")
    assert f"{beside} is no JSON" in error(*runs)
    beside.write_text(json.dumps({k: v for k, v in content.items() if k != "ceiling"}))
    assert f"{beside} has no usable ceiling" in error(*runs)
    beside.unlink()
    assert f"{beside} is not there; test.py writes it" in error(*runs)
    assert "is no .jsonl" in error(beside, runs[1])


def test_mistakes_end_the_program_in_one_line(runs, tmp_path):
    ending = run_command(sys.executable, "tools/compare_runs.py", tmp_path / "a.jsonl", runs[1])
    assert ending.returncode == 1
    assert ending.stderr == f"error: {tmp_path}/a.jsonl: No such file or directory\n"
    assert "is no .jsonl" in error(runs[0], runs[1].parent)
    with pytest.raises(NotADirectoryError):  # a file, where a folder is to be
        main(*runs, "-o", runs[0])
