"""tools/download.py: every way in which a host or an archive goes wrong, on 127.0.0.1."""

import fcntl
import hashlib
import io
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from odd_server import Answer, OddServer, serve

from tools import download
from tools.download import UnfitError, check_file, check_space, fetch, members, unzip
from utils.errors import UserError

# Looks like an archive, is larger than one block, and compresses to nothing in no repository.
CONTENT = b"PK\x03\x04" + bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[:4] + CONTENT[:3:-1]
HTML = b"<!DOCTYPE html><title>Moved</title>" * 40


@pytest.fixture
def server() -> Iterator[OddServer]:
    with serve() as odd:
        yield odd


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses that were made between tries; nobody waits for them."""
    made: list[float] = []
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=made.append))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return made


@pytest.fixture
def get(tmp_path, pauses) -> Callable[..., Path]:
    """`get(url, …)` downloads to x.zip, checks its digest, and gives its path."""

    def run(*urls: str, size: int | None = None, sha256: str | None = DIGEST) -> Path:
        path = tmp_path / "x.zip"
        fetch(urls, path, size=size, check=partial(check_file, sha256=sha256))
        return path

    return run


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_is_downloaded_whole_and_nothing_else_is_left(server, get, tmp_path, pauses):
    assert get(server.put("x.zip", CONTENT)).read_bytes() == CONTENT
    assert left(tmp_path) == ["x.zip"]
    assert pauses == []
    assert server.requests == [("x.zip", None)]


def test_a_file_without_a_length_is_downloaded_too(server, get):
    url = server.put("x.zip", CONTENT, Answer(gives_length=False))
    assert get(url).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(404), "HTTP 404 Not Found"),
        (Answer(403), "HTTP 403 Forbidden"),
        (
            Answer(body=HTML, headers={"Content-Type": "text/html; charset=utf-8"}),
            r"answers with a web page \(text/html\)",
        ),
        (Answer(body=HTML), r"answers with a web page \(it begins b'<!DOCTYPE"),
        (Answer(body=b"\x1f\x8b" + CONTENT), r"answers with something else \(it begins b'\\x1f"),
        (Answer(body=CONTENT + b"more"), "offers 1,048,584 bytes, but the file has 1,048,580"),
        (Answer(body=CONTENT[:-9]), "offers 1,048,571 bytes, but the file has 1,048,580"),
        (Answer(body=b"PK" + CONTENT[2:-1] + b"!"), "has SHA-256 [0-9a-f]{64}, not " + DIGEST),
    ],
    ids=["404", "403", "html", "html that says zip", "no zip", "longer", "shorter", "digest"],
)
def test_a_host_that_answers_wrongly_is_named_and_the_next_one_tried(
    server, get, capsys, tmp_path, pauses, answer, reason
):
    bad = server.put("bad/x.zip", CONTENT, answer)
    good = server.put("good/x.zip", CONTENT)
    assert get(bad, good, size=len(CONTENT)).read_bytes() == CONTENT
    assert re.search(f"{re.escape(bad)}: {reason}", capsys.readouterr().err)
    assert [name for name, _ in server.requests] == ["bad/x.zip", "good/x.zip"]
    assert pauses == []
    assert left(tmp_path) == ["x.zip"]


def test_when_no_host_has_it_one_line_gives_every_reason_and_the_way_out(server, get, tmp_path):
    urls = [
        server.put("a/x.zip", CONTENT, Answer(404)),
        server.put("b/x.zip", HTML),
        "http://127.0.0.1:1/x.zip",
    ]
    with pytest.raises(UserError) as caught:
        get(*urls)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    for url, reason in zip(urls, ("HTTP 404", "web page", "refused, 5 times"), strict=True):
        assert re.search(f"{re.escape(url)}: .*{reason}", line)
    assert "--from FOLDER" in line
    assert left(tmp_path) == []


@pytest.mark.parametrize("cut", [500_000, 300_000])
def test_a_connection_that_breaks_off_is_continued_where_it_broke(server, get, pauses, cut):
    url = server.put("x.zip", CONTENT, Answer(cut=cut))
    assert get(url).read_bytes() == CONTENT
    (first, second) = server.requests
    assert first == ("x.zip", None)
    assert second == ("x.zip", f"bytes={cut}-")
    assert pauses == [1]


def test_a_short_body_is_continued_until_it_is_whole(server, get, capsys):
    url = server.put("x.zip", CONTENT, *(Answer(cut=300_000) for _ in range(3)))
    assert get(url).read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [
        None, "bytes=300000-", "bytes=600000-", "bytes=900000-",
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "the answer ended after 300,000 of 1,048,580 bytes; 300,000 bytes are here" in said


def test_a_body_that_always_ends_at_the_same_byte_is_given_up(server, get):
    answers = [Answer(cut=300_000, obeys_range=False) for _ in range(20)]
    url = server.put("x.zip", CONTENT, *answers)
    with pytest.raises(UserError, match=r"ended after 300,000 of 1,048,580 bytes, 5 times"):
        get(url)
    assert len(server.requests) == 5


def test_a_host_that_ignores_ranges_starts_anew_and_it_is_said(server, get, capsys):
    url = server.put("x.zip", CONTENT, Answer(cut=500_000), Answer(obeys_range=False))
    assert get(url).read_bytes() == CONTENT
    assert f"{url}: does not continue downloads: starting anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ({}, {}, "its etag was"),
        (
            {"ETag": None, "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"},
            {"ETag": None, "Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"},
            "its modified was Mon, 01 Jan",
        ),
        ({"ETag": None}, {"ETag": None}, "its length was 1048581, is 1048580"),
        ({"ETag": 'W/"1"'}, {"ETag": 'W/"2"'}, 'its etag was W/"1", is W/"2"'),
    ],
    ids=["etag", "date", "length", "weak etag"],
)
@pytest.mark.parametrize("heeds_condition", [True, False])
def test_a_file_that_changed_meanwhile_is_downloaded_anew_and_it_is_said(
    server, get, capsys, before, after, change, heeds_condition
):
    old = Answer(body=OTHER + b"!", cut=500_000, headers=before)
    new = Answer(headers=after, heeds_condition=heeds_condition)
    url = server.put("x.zip", CONTENT, old, new, new)
    assert get(url).read_bytes() == CONTENT
    assert re.search(
        rf"{re.escape(url)}: has changed \({re.escape(change)}.*\): starting anew",
        capsys.readouterr().err,
    )


def test_a_file_that_became_shorter_than_what_is_here_is_downloaded_anew(server, get, capsys):
    url = server.put("x.zip", CONTENT, Answer(body=CONTENT * 3, cut=len(CONTENT) + 9))
    server.answers["x.zip"] += [Answer(heeds_condition=False)]
    assert get(url).read_bytes() == CONTENT
    assert "has no byte 1,048,589 any more: starting anew" in capsys.readouterr().err


def test_an_overloaded_host_is_asked_again_after_the_pause_that_it_wants(server, get, pauses):
    url = server.put("x.zip", CONTENT, Answer(503), Answer(429, headers={"Retry-After": "7"}))
    assert get(url).read_bytes() == CONTENT
    assert pauses == [1, 7]


def test_pauses_double_and_end(server, get, pauses):
    url = server.put("x.zip", CONTENT, *(Answer(503) for _ in range(9)))
    with pytest.raises(UserError, match="HTTP 503 Service Unavailable, 5 times in a row"):
        get(url)
    assert pauses == [1, 2, 4, 8]


def test_no_host_makes_anybody_wait_for_hours(server, get, pauses):
    get(server.put("x.zip", CONTENT, Answer(503, headers={"Retry-After": "86400"})))
    assert pauses == [60]


def test_the_next_run_continues_and_begins_with_the_host_that_was_begun(server, get, tmp_path):
    first = server.put("first/x.zip", CONTENT, Answer(404))
    second = server.put("second/x.zip", CONTENT, Answer(cut=500_000))
    server.answers["second/x.zip"] += [Answer(404)]
    with pytest.raises(UserError):
        get(first, second)
    assert left(tmp_path) == ["x.zip.part", "x.zip.part.json"]
    server.requests.clear()
    assert get(first, second).read_bytes() == CONTENT
    assert server.requests == [("second/x.zip", "bytes=500000-")]
    assert left(tmp_path) == ["x.zip"]


def test_a_bad_answer_of_another_host_does_not_cost_what_is_here(server, get, tmp_path):
    begun = server.put("begun/x.zip", CONTENT, Answer(cut=500_000), Answer(404))
    page = server.put("page/x.zip", HTML)
    with pytest.raises(UserError):
        get(begun, page)
    assert (tmp_path / "x.zip.part").read_bytes() == CONTENT[:500_000]


def test_a_download_that_was_whole_before_the_power_went_is_not_repeated(server, get, tmp_path):
    url = server.put("x.zip", CONTENT, Answer(cut=500_000), Answer(404))
    with pytest.raises(UserError):
        get(url)
    (tmp_path / "x.zip.part").write_bytes(CONTENT)
    server.requests.clear()
    assert get(url).read_bytes() == CONTENT
    assert server.requests == []


def test_a_part_of_unknown_origin_is_not_continued(server, get, tmp_path):
    (tmp_path / "x.zip.part").write_bytes(b"PK of something else")
    assert get(server.put("x.zip", CONTENT)).read_bytes() == CONTENT
    assert server.requests == [("x.zip", None)]


def test_two_processes_do_not_write_one_file(server, get, tmp_path):
    url = server.put("x.zip", CONTENT)
    with (tmp_path / "x.zip.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"x\.zip\.part is being written by another process"):
            get(url)
    assert server.requests == []


def test_a_download_without_room_for_it_is_refused_before_it_is_written(server, get, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
    with pytest.raises(
        UserError, match=r"downloading x\.zip needs about 1 MB in .*, where 0 MB are free"
    ):
        get(server.put("x.zip", CONTENT))


def test_room_is_looked_for_in_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    asked = []
    usage = SimpleNamespace(free=3 * 10**9)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: asked.append(path) or usage)
    check_space(tmp_path / "a/b", 3 * 10**9, "all of it")
    with pytest.raises(
        UserError, match=r"all of it needs about 3\.5 GB in .*a/b, where 3\.0 GB are free: make"
    ):
        check_space(tmp_path / "a/b", 3_500_000_000, "all of it")
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:x/x.zip", "http://[/x.zip"])
def test_an_address_that_is_none_is_named(get, url):
    with pytest.raises(UserError, match=rf"{re.escape(url)}: is no address"):
        get(url)


# ------------------------------------------------------------------------------------- archives


def archive(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def test_an_archive_is_unpacked_and_its_folders_with_it(tmp_path):
    path = archive(tmp_path / "x.zip", ("a/", b""), ("a/b/c.txt", b"one"), ("d.txt", b"two"))
    unzip(path, tmp_path / "out", members(path))
    files = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*.txt")}
    assert {name: p.read_bytes() for name, p in files.items()} == {
        "a/b/c.txt": b"one",
        "d.txt": b"two",
    }


@pytest.mark.parametrize(
    "entry",
    [
        "../evil",
        "a/../../evil",
        "/evil",
        "..\\evil",
        "C:\\evil",
        "\\\\host\\evil",
        link("a/evil"),
    ],
    ids=str,
)
def test_an_archive_that_would_write_outside_its_folder_is_not_unpacked_at_all(tmp_path, entry):
    path = archive(tmp_path / "x.zip", ("good", b"x"), (entry, b"/etc/passwd"))
    with pytest.raises(UnfitError, match=r"is not unpacked: its entry .*evil"):
        unzip(path, tmp_path / "in/out", members(path))
    assert left(tmp_path) == ["x.zip"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: HTML, lambda data: b""]
)
def test_what_is_no_whole_archive_is_refused(tmp_path, damage):
    path = archive(tmp_path / "x.zip", ("a", b"x" * 1000))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UnfitError, match=r"is no whole zip archive \("):
        members(path)


def test_a_damaged_member_is_named_and_does_not_appear(tmp_path):
    path = archive(tmp_path / "x.zip", ("a", b"fine"), ("b", os.urandom(5000)))
    data = bytearray(path.read_bytes())
    data[data.index(b"b", 60) + 2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path} is damaged at b \(.*delete it and run"):
        unzip(path, tmp_path / "out", members(path))
    assert left(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("place", range(60, 1060, 100))
def test_damage_is_told_whatever_compressed_the_member(tmp_path, method, place):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as made:
        made.writestr("b", os.urandom(5000))
    data = bytearray(path.read_bytes())
    data[place : place + 60] = bytes(60)
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path} is damaged at b \((?!None).+\): delete it"):
        unzip(path, tmp_path / "out", members(path))
    assert left(tmp_path / "out") == []


def test_unpacking_goes_on_where_it_stopped_and_replaces_what_is_not_whole(tmp_path):
    names = ("whole", "cut", "changed", "missing")
    path = archive(tmp_path / "x.zip", *((name, b"content of " + name.encode()) for name in names))
    out = tmp_path / "out"
    unzip(path, out, members(path))
    os.utime(out / "whole", (1, 1))
    os.truncate(out / "cut", 3)
    (out / "changed").write_bytes(b"CONTENT OF changed")
    (out / "missing").unlink()
    unzip(path, out, members(path))
    assert (out / "whole").stat().st_mtime == 1
    for name in names:
        assert (out / name).read_bytes() == b"content of " + name.encode()


def test_an_archive_without_room_for_it_is_not_begun(tmp_path, monkeypatch):
    path = archive(tmp_path / "x.zip", ("a", b"x" * 1000))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with pytest.raises(UserError, match=r"unpacking x\.zip needs about"):
        unzip(path, tmp_path / "out", members(path))
    assert left(tmp_path) == ["x.zip"]


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    path = archive(tmp_path / "x.zip", ("a", b"x" * 1000))

    def fails(source: io.IOBase, target: io.IOBase) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfileobj", fails)
    with pytest.raises(OSError, match="No space") as caught:
        unzip(path, tmp_path / "out", members(path))
    assert caught.value.filename == str(tmp_path / "out/a")
    assert left(tmp_path / "out") == []
