"""tools/download.py: every way in which a host or an archive goes wrong, on 127.0.0.1."""

import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers import largest_file, user_error
from odd_server import Answer

from tools.download import UnfitError, check_file, fetch, names_in, unpack

CONTENT = b"PK\x03\x04" + bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[:4] + CONTENT[:3:-1]
HTML = b"<!DOCTYPE html><title>Moved</title>" * 40


@pytest.fixture
def get(tmp_path) -> Callable[..., bytes]:
    """`get(url, …)` downloads to x.zip, checks its digest, and gives what is in it."""

    def run(*urls: str) -> bytes:
        path = tmp_path / "x.zip"
        fetch(urls, path, partial(check_file, size=None, sha256=DIGEST))
        assert os.listdir(tmp_path) == ["x.zip"]
        return path.read_bytes()

    return run


@pytest.mark.parametrize("gives_length", [True, False])
def test_a_file_is_downloaded_whole_and_nothing_else_is_left(server, get, gives_length):
    assert get(server.put("a", CONTENT, Answer(gives_length=gives_length))) == CONTENT


def test_the_hub_is_a_source_too(server, get):
    server.put_hub("datasets/o/n", {"deep/a.zip": CONTENT})
    server.put_hub("o/model", {"a.zip": OTHER})
    assert get("hf:o/model/a.zip", "hf:datasets/o/n/deep/a.zip") == CONTENT


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(404), "HTTP 404"),
        (Answer(403), "HTTP 403"),
        (Answer(body=HTML, headers={"Content-Type": "text/html"}), "a web page"),
        (Answer(body=OTHER), "has SHA-256"),
        (Answer(body=CONTENT[:50_000]), "has SHA-256"),
    ],
)
def test_a_host_that_answers_wrongly_is_named_and_the_next_one_tried(
    server, get, capsys, answer, reason
):
    bad, good = server.put("bad", CONTENT, answer), server.put("good", CONTENT)
    assert get(bad, good) == CONTENT
    assert re.search(f"{bad}: .*{reason}", capsys.readouterr().out)


def test_when_nobody_has_it_one_line_gives_every_reason_and_the_way_out(server, tmp_path):
    bad = server.put("bad", CONTENT, Answer(404))
    urls = [bad, "http://127.0.0.1:1/x", "hf:o/none/x", "nonsense"]
    message = user_error(fetch, urls, tmp_path / "x.zip", lambda _: None)
    assert all(f"{url}: " in message for url in urls)
    assert "--from FOLDER" in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("answer", [Answer(cut=327_680), Answer(cut=0), Answer(503), Answer(429)])
def test_a_failure_that_may_pass_is_tried_again_from_where_it_broke(server, get, answer):
    assert get(server.put("a", CONTENT, answer, Answer(503))) == CONTENT
    assert server.requests[-1] == ("a", f"bytes={answer.cut}-" if answer.cut else None)


def test_a_host_that_fails_for_ever_is_given_up_and_another_one_continues(server, get, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    bad = server.put("bad", CONTENT, Answer(cut=327_680), *[Answer(503)] * 9)
    assert get(bad, server.put("good", CONTENT)) == CONTENT
    assert server.requests[-1] == ("good", "bytes=327680-")
    assert pauses == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("begun", "answers", "asked"),
    [
        (CONTENT[:200_000], [], ["bytes=200000-"]),
        (OTHER[:200_000], [], ["bytes=200000-", None]),  # the file has changed since
        (CONTENT + b"more", [], ["bytes=1048584-", None]),  # it has become shorter
        (CONTENT[:200_000], [Answer(obeys_range=False)], ["bytes=200000-"]),
        (CONTENT[:200_000], [Answer(206, headers={"Content-Range": "bytes 5-9/10"})],
            ["bytes=200000-", None]),
    ],
)  # fmt: skip
def test_the_next_run_goes_on_where_the_last_one_was_killed_or_downloads_anew(
    server, get, tmp_path, begun, answers, asked
):
    (tmp_path / "x.part.zip").write_bytes(begun)
    assert get(server.put("a", CONTENT, *answers)) == CONTENT
    assert [part for _, part in server.requests] == asked


def test_a_digest_with_one_witness_warns_and_one_with_several_refuses(tmp_path, capsys):
    path = tmp_path / "x.zip"
    path.write_bytes(OTHER)
    check_file(path, len(OTHER), DIGEST, witnesses=1)
    assert "warning" in capsys.readouterr().out
    with pytest.raises(UnfitError, match="has SHA-256"):
        check_file(path, len(OTHER), DIGEST, witnesses=2)
    with pytest.raises(UnfitError, match="bytes, not 7"):
        check_file(path, 7, DIGEST, witnesses=1)


def write_zip(path: Path, *names: str, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in names:
            archive.writestr(name, bytes(range(256)) * 40)
    return path


def test_of_two_files_of_one_name_none_is_chosen_but_hidden_ones_do_not_count(tmp_path):
    names = [f"{folder}/{file}" for folder in ("a", "b") for file in (".DS_Store", "refs(unc).p")]
    unpack(write_zip(tmp_path / "a.zip", *names[:3]), tmp_path / "target")
    assert os.listdir(tmp_path / "target") == ["refs(unc).p"]
    with pytest.raises(UnfitError, match="files of the same name in several folders"):
        unpack(write_zip(tmp_path / "b.zip", *names), tmp_path / "other")


def test_an_archive_writes_plain_files_into_its_folder_and_nothing_outside(tmp_path):
    names = ["a/1", "a/../../2", "a/../../../tmp/3", "/4", "a//5", "a/deep/6", "a/empty/"]
    path = write_zip(tmp_path / "a.zip", *names)
    link = zipfile.ZipInfo("a/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    target = tmp_path / "in/deep/target"
    (target.parent / ".target.999999999.partial").mkdir(parents=True)  # of a killed run
    unpack(path, target)
    folders = {path, target, target.parent, target.parents[1]}
    assert set(tmp_path.rglob("*")) - folders == {target / name for name in [*"123456", "link"]}
    assert not (target / "link").is_symlink()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("place", [60, 75, 90])
def test_a_damaged_member_is_told_and_nothing_appears(tmp_path, method, place):
    path = write_zip(tmp_path / "a.zip", "a/1", method=method)
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UnfitError, match="is no whole archive"):
        unpack(path, tmp_path / "target")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_a_full_disk_is_told_with_the_name_of_the_file(server, tmp_path):
    url = server.put("a", CONTENT)
    with largest_file(5_000), pytest.raises(OSError, match="File too large") as caught:
        fetch([url], tmp_path / "x.zip", names_in)
    assert str(caught.value.filename).startswith(str(tmp_path))
