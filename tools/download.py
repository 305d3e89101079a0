"""Get published files over HTTP and unpack archives, whatever the data set.

A download lies in `<name>.part` until it is whole and checked. What the server said about it (its
address, ETag, date and length) lies in `<name>.part.json`, so that it goes on where it stopped,
by an HTTP range, if the file there is still the same one, and starts anew if it is not.

All files meant here are zip archives (CLIP's weights are too), which tells them from web pages.
"""

import hashlib
import http.client
import json
import lzma
import os
import re
import shutil
import ssl
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from tqdm import tqdm

from utils.errors import UserError
from utils.files import atomic_path
from utils.lock import hold

TRIES = 5  # in a row without getting any further
PAUSE = 1.0  # seconds before the second try; doubled before each one after
LONGEST_PAUSE = 60.0  # whatever a server asks for
TIMEOUT = 30.0  # seconds without a byte
BLOCK = 1 << 16
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers that may be another one soon
ZIP_MAGIC = b"PK"
# What each way to compress raises on damaged data; bz2, a bare OSError.
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError)


class UnfitError(UserError):
    """Tells that a file, or a mirror's answer, is not what was asked for; the text says why."""


class _InterruptedError(Exception):
    """Tells of a failure that may go better next time; the server asked to `wait` seconds."""

    def __init__(self, reason: object, wait: float = 0.0) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.wait = wait


@dataclass(frozen=True)
class _Identity:
    """Holds what tells a server's versions of a file apart; None where it is not said."""

    url: str
    etag: str | None
    modified: str | None
    length: int | None  # bytes of the whole file

    @classmethod
    def of(cls, url: str, response: http.client.HTTPResponse) -> Self:
        headers = response.headers
        if response.status == 206:
            total = headers.get("Content-Range", "").rpartition("/")[2]
        else:
            total = headers.get("Content-Length", "")
        length = int(total) if total.isdecimal() else None
        return cls(url, headers.get("ETag"), headers.get("Last-Modified"), length)

    def difference(self, other: "_Identity") -> str | None:
        """Return how `other` shows that the file has changed, or None."""
        for name in ("etag", "modified", "length"):
            before, now = getattr(self, name), getattr(other, name)
            if None not in (before, now) and before != now:
                return f"its {name} was {before}, is {now}"
        return None


def fetch(
    urls: Sequence[str],
    path: Path,
    *,
    size: int | None = None,
    check: Callable[[Path], str],
) -> str:
    """Get a file from the first address that has it.

    Each address is asked again, with growing pauses, while it gets further or fails in a way that
    may pass; the next one is tried when it does not have the file.

    Args:
        urls: addresses of the same file, in order.
        path: where it goes once it is whole and checked.
        size: in bytes, where that is known.
        check: looks at the whole file; raises UnfitError.
    Returns:
        What `check` returned.
    Raises:
        UserError: no address had it; the text gives the reason for each.
    """
    part, path_of_identity = _parts(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    with _alone(part):
        begun = _read_identity(path_of_identity)
        # What was begun is finished first.
        for url in sorted(urls, key=lambda url: begun is None or url != begun.url):
            try:
                _fetch_from(url, path, size)
                result = _checked(path, check)
            except UnfitError as reason:
                say(f"{url}: {reason}")
                reasons.append(f"{url}: {reason}")
            else:
                os.replace(part, path)
                path_of_identity.unlink(missing_ok=True)
                return result
    raise UserError(
        f"{path.name} could not be downloaded ({'; '.join(reasons)}): get it in another way, "
        "put it into a folder and pass --from FOLDER, or name an address with --mirror"
    )


def check_file(path: Path, size: int | None = None, sha256: str | None = None) -> str:
    """Compare a file with what is known of it, and give its SHA-256.

    Raises:
        UnfitError: it is not that file.
    """
    found = path.stat().st_size
    if size is not None and found != size:
        raise UnfitError(f"has {found:,} bytes, not {size:,}")
    digest = _sha256(path)
    if sha256 is not None and digest != sha256:
        raise UnfitError(f"has SHA-256 {digest}, not {sha256}")
    return digest


def members(path: Path) -> list[zipfile.ZipInfo]:
    """List the files in an archive, all of whose names have been found safe.

    Raises:
        UnfitError: it is no whole zip archive, or a name would lead out of the folder that it is
            unpacked in, or an entry is a link or a device.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UnfitError(f"is no whole zip archive ({error})") from None
    for entry in entries:
        if _is_unsafe(entry):
            raise UnfitError(
                f"is not unpacked: its entry {entry.filename!r:.120} is a link or leads out of "
                "the folder, as in no honest archive"
            )
    return [entry for entry in entries if not entry.is_dir()]


def unzip(path: Path, folder: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Unpack some members of an archive; those that are there already (size, CRC) are left alone.

    Each file appears when it is complete, so an interrupted run is continued by another one.

    Args:
        entries: of `members(path)`.
    Raises:
        UserError: not enough space, or the archive is damaged.
    """
    missing = [e for e in entries if _length(folder / e.filename) != e.file_size]
    check_space(folder, sum(entry.file_size for entry in missing), f"unpacking {path.name}")
    total = sum(entry.file_size for entry in entries)
    with zipfile.ZipFile(path) as archive, _bytes_bar(total, f"unpack {path.name}") as bar:
        for entry in entries:
            target = folder / entry.filename
            bar.update(entry.file_size)
            if _is_there(target, entry):
                continue
            try:
                with (
                    atomic_path(target) as partial,
                    _naming(target),
                    archive.open(entry) as source,
                    partial.open("wb") as file,
                ):
                    shutil.copyfileobj(source, file)
            except _DAMAGE as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of the disk
                raise UserError(
                    f"{path} is damaged at {entry.filename} ({error or type(error).__name__}): "
                    "delete it and run this again"
                ) from None


def check_space(folder: Path, need: int, what: str) -> None:
    """Make sure that `need` bytes fit into the file system of a folder that may not exist yet.

    Raises:
        UserError: they do not; names both figures.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if need > free:
        raise UserError(
            f"{what} needs about {show_bytes(need)} in {folder}, where {show_bytes(free)} are "
            "free: make room, or give another folder"
        )


def show_bytes(number: int) -> str:
    """Return a text such as `13.5 GB` or `45 MB`."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def say(line: str) -> None:
    """Print a line without tearing a progress bar."""
    tqdm.write(f"  {line}", file=sys.stderr)


def _fetch_from(url: str, path: Path, size: int | None) -> None:
    """Complete `<path>.part` from one address.

    Raises:
        UnfitError: this address does not have the file, or fails again and again.
    """
    furthest, failures = _length(_parts(path)[0]) or 0, 0
    while True:
        try:
            return _go_on(url, path, size)
        except _InterruptedError as problem:
            reached = _length(_parts(path)[0]) or 0
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures == TRIES:
                raise UnfitError(f"{problem}, {TRIES} times in a row") from None
            pause = min(max(problem.wait, PAUSE * 2 ** (failures - 1)), LONGEST_PAUSE)
            say(f"{url}: {problem}; {reached:,} bytes are here, trying again in {pause:.0f} s")
            time.sleep(pause)


def _checked(path: Path, check: Callable[[Path], str]) -> str:
    try:
        return check(_parts(path)[0])
    except UnfitError:
        _drop(path)
        raise


def _go_on(url: str, path: Path, size: int | None) -> None:
    """Make one request: for the rest of what is there, or for all of it.

    Nothing that is there is given up before the answer has been found to be the file.
    """
    part, path_of_identity = _parts(path)
    begun = _read_identity(path_of_identity)
    offset = _length(part) if begun and begun.url == url else 0
    if offset and offset == begun.length:
        return
    with _request(url, begun if offset else None, offset) as response:
        if response.status == 416:
            say(f"{url}: has no byte {offset:,} any more: starting anew")
            _drop(path)
            return _go_on(url, path, size)
        now = _Identity.of(url, response)
        change = begun.difference(now) if offset else None
        if response.status == 206 and (change or not _continues(response, offset)):
            say(f"{url}: has changed ({change or 'other range than asked for'}): starting anew")
            _drop(path)
            return _go_on(url, path, size)
        block = _read(response)
        is_rest = response.status == 206
        _check_answer(response, now, size, None if is_rest else block)
        if offset and not is_rest:
            why = f"has changed ({change})" if change else "does not continue downloads"
            say(f"{url}: {why}: starting anew")
            offset = 0
        if not offset:
            with atomic_path(path_of_identity) as partial:
                partial.write_text(json.dumps(asdict(now)))
        expected = now.length if size is None else size
        if expected is not None:
            check_space(path.parent, expected - offset, f"downloading {path.name}")
        reached = _write(response, block, part, offset, expected)
    if expected is not None and reached < expected:
        raise _InterruptedError(f"the answer ended after {reached:,} of {expected:,} bytes")
    if expected is not None and reached > expected:
        _drop(path)
        raise UnfitError(f"sent more than the {expected:,} bytes of the file")


def _write(
    response: http.client.HTTPResponse, block: bytes, part: Path, offset: int, total: int | None
) -> int:
    """Write the answer's body into the part from `offset` on, and return the part's length."""
    name = part.name.removesuffix(".part")
    with _naming(part), part.open("r+b") as file, _bytes_bar(total, name, offset) as bar:
        file.truncate(offset)
        reached = file.seek(offset)
        while block and (total is None or reached <= total):
            file.write(block)
            file.flush()
            reached += len(block)
            bar.update(len(block))
            block = _read(response)
        return reached


def _request(url: str, begun: _Identity | None, offset: int) -> http.client.HTTPResponse:
    """Ask for a file, or for what follows `offset` if it is still the one that was begun."""
    headers = {"User-Agent": "cris-prepare", "Accept-Encoding": "identity"}
    if begun is not None:
        headers["Range"] = f"bytes={offset}-"
        is_weak = begun.etag is None or begun.etag.startswith("W/")
        condition = begun.modified if is_weak else begun.etag
        if condition:
            headers["If-Range"] = condition
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as answer:
        if answer.code == 416 and offset:
            return answer
        answer.close()
        reason = f"HTTP {answer.code} {answer.reason}"
        if answer.code in PASSING:
            asked = answer.headers.get("Retry-After", "")
            raise _InterruptedError(reason, float(asked) if asked.isdecimal() else 0.0) from None
        raise UnfitError(reason) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UnfitError(error.reason) from None
        raise _InterruptedError(error.reason) from None
    except (ValueError, http.client.InvalidURL) as error:
        raise UnfitError(f"is no address ({error})") from None
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(error) from None


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(f"connection lost ({error or type(error).__name__})") from None


def _check_answer(
    response: http.client.HTTPResponse,
    identity: _Identity,
    size: int | None,
    beginning: bytes | None,
) -> None:
    """Refuse an answer that is not the file; `beginning` is the file's, if it is in the answer."""
    kind = response.headers.get_content_type()
    if "html" in kind:
        raise UnfitError(f"answers with a web page ({kind}), not with the file")
    if beginning and not beginning.startswith(ZIP_MAGIC):
        what = "a web page" if beginning.lstrip()[:1] == b"<" else "something else"
        raise UnfitError(f"answers with {what} (it begins {beginning[:24]!r}), not with the file")
    if size is not None and identity.length not in (None, size):
        raise UnfitError(f"offers {identity.length:,} bytes, but the file has {size:,}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give errors of writing (a full disk), which come without one, the name of the file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Let no other process write this part meanwhile; an empty one goes in the end."""

    def refuse() -> None:
        raise UserError(f"{part} is being written by another process: wait until it is done")

    with hold(part, refuse):
        try:
            yield
        finally:
            if not _length(part):
                part.unlink(missing_ok=True)


def _continues(response: http.client.HTTPResponse, offset: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _is_unsafe(entry: zipfile.ZipInfo) -> bool:
    name = entry.filename.replace("\\", "/")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    return (
        ".." in name.split("/")
        or name.startswith("/")
        or re.match("[A-Za-z]:", name) is not None
        or kind not in (0, stat.S_IFREG, stat.S_IFDIR)
    )


def _is_there(path: Path, entry: zipfile.ZipInfo) -> bool:
    if _length(path) != entry.file_size:
        return False
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc == entry.CRC


def _parts(path: Path) -> tuple[Path, Path]:
    """Return where a download lies until it is whole, and what is known of its source."""
    return path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")


def _drop(path: Path) -> None:
    """Give up what was downloaded; the part itself stays, since it is locked."""
    part, path_of_identity = _parts(path)
    os.truncate(part, 0)
    path_of_identity.unlink(missing_ok=True)


def _read_identity(path: Path) -> _Identity | None:
    try:
        return _Identity(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _length(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, _bytes_bar(path.stat().st_size, f"check {path.name}") as bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _bytes_bar(total: int | None, what: str, done: int = 0) -> tqdm:
    """Show speed and remaining time on a terminal, and nothing elsewhere."""
    return tqdm(
        total=total, initial=done, desc=what, unit="B", unit_scale=True, disable=None, leave=False
    )
