"""Get a published file from the first address that has it, and unpack archives.

A file lies beside its place, with `.part` in its name, until it is whole and checked; the same
command goes on with it.
"""

import hashlib
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import requests
from huggingface_hub import hf_hub_download
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential
from tqdm import tqdm

from utils.errors import UserError
from utils.files import staging_folder

TIMEOUT = 30.0  # seconds without a byte
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers that may be another one soon
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


class UnfitError(UserError):
    """Tells that an address does not give the file that was asked for; the text says why."""


class _PassingError(UnfitError):
    """Tells of a failure that may pass: the same address is asked again."""


def fetch(sources: Sequence[str], path: Path, check: Callable[[Path], object]) -> None:
    """Get a file from the first source that has it; a file of this machine is linked to.

    Args:
        sources: paths, `https://...` or `hf:...`, in order.
        check: raises UnfitError for another file.
    Raises:
        UserError: none had it; the text gives the reason of each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, reasons = path.with_stem(f"{path.stem}.part"), []
    for source in sources:
        # What another source or an earlier call has begun may be of another file.
        for is_last in (False, True) if part.is_file() else (True,):
            try:
                here = _get(source, part)
                check(here)
                return os.replace(here, path) if here == part else path.symlink_to(here)
            except UnfitError as reason:
                print(f"  {source}: {reason}")
                reasons += [f"{source}: {reason}"] if is_last else []
                if not isinstance(reason, _PassingError):
                    part.unlink(missing_ok=True)
    raise UserError(
        f"{path.name} could not be had ({'; '.join(reasons)}): get it in another way, put it into "
        "a folder and pass --from FOLDER, or name an address with --mirror"
    )


def check_file(path: Path, size: int | None, sha256: str, witnesses: int = 2) -> None:
    """Compare a file with what is known of it; a digest with one witness only warns.

    Raises:
        UnfitError: it is not that file.
    """
    found = path.stat().st_size
    if size not in (None, found):
        raise UnfitError(f"{path} has {found:,} bytes, not {size:,}: get it again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256 and witnesses > 1:
        raise UnfitError(f"{path} has SHA-256 {digest}, not {sha256}: get it again")
    if digest != sha256:
        print(f"  warning: {path} has SHA-256 {digest}, where one source states {sha256}")


def members(path: Path) -> list[zipfile.ZipInfo]:
    """List what is in a zip archive.

    Raises:
        UnfitError: it is none, or is cut off.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (*DAMAGE, OSError) as error:
        with path.open("rb") as file:
            start = file.read(24)
        what = "a web page" if start.lstrip()[:1] == b"<" else "no whole zip archive"
        raise UnfitError(f"{path} is {what} ({error}; it begins {start!r}): get it again") from None


def unzip(path: Path, name: str, target: Path) -> None:
    """Unpack an archive's folder as `target`, which appears when it is complete.

    Whatever its entries are called, zipfile writes all of them below one folder.

    Raises:
        UserError: the archive is damaged, or there is too little room.
    """
    entries = [entry for entry in members(path) if entry.filename.startswith(f"{name}/")]
    try:
        with staging_folder(target) as staging, zipfile.ZipFile(path) as archive:
            check_space(target, sum(entry.file_size for entry in entries), f"unpacking {path}")
            for entry in tqdm(entries, desc=f"unpack {path.name}", disable=None, leave=False):
                archive.extract(entry, staging)
            os.replace(staging / name, target)
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # bz2's have none
            error.filename = error.filename or str(target)
            raise
        raise UserError(f"{path} is damaged ({error}): delete it and run this again") from None


def untar(path: Path, names: Sequence[str], target: Path | None = None) -> None:
    """Unpack these files of a tar archive, whatever folders they are in, as a new folder.

    Args:
        target: the folder; without it the archive is only looked through.
    Raises:
        UnfitError: it is no whole tar archive, or lacks a file.
    """
    found = set()
    try:
        beside = nullcontext() if target is None else staging_folder(target)
        with beside as staging, tarfile.open(path) as archive:
            for entry in archive:
                if entry.isfile() and (name := Path(entry.name).name) in names:
                    found.add(name)
                    if target is not None:
                        with archive.extractfile(entry) as file, (staging / name).open("wb") as out:
                            shutil.copyfileobj(file, out)
            if target is not None and len(found) == len(names):
                os.replace(staging, target)
    except (*DAMAGE, tarfile.TarError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip's have none
            error.filename = error.filename or str(target)
            raise
        reason = " ".join(str(error).split())
        raise UnfitError(f"{path} is no whole tar archive ({reason}): get it again") from None
    if lacking := [name for name in names if name not in found]:
        raise UnfitError(
            f"{path} lacks {', '.join(lacking)}: put {' and '.join(names)} into a folder below "
            "FOLDER, called as the data set, and pass --from FOLDER"
        )


def check_space(folder: Path, need: int, what: str) -> None:
    """Raise UserError if `need` bytes do not fit where a folder is, or will be."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if need > free:
        raise UserError(
            f"{what} needs about {need / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are "
            "free: make room, or give another folder"
        )


def ask_hub(download: Callable[..., str], repository: str, **what: Any) -> str:
    """Call one of huggingface_hub's downloads, which resume, retry and show progress.

    Raises:
        UnfitError: the Hub does not have it, or cannot be reached.
    """
    try:
        return download(repository, endpoint=os.environ.get("HF_ENDPOINT"), **what)
    except (requests.RequestException, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnfitError(
            f"{repository} could not be downloaded ({reason}): get it in another way, put it into "
            "a folder and pass --from FOLDER"
        ) from None


def _get(source: str, part: Path) -> Path:
    """Return a file of this machine, or `part`, completed from an address."""
    if source.startswith(("http://", "https://")):
        return _go_on(source, part)
    if not source.startswith("hf:"):
        if not Path(source).is_file():
            raise UnfitError("there is no such file")
        return Path(source).resolve()
    parts = source.removeprefix("hf:").split("/")
    kind = "dataset" if parts[0] == "datasets" else None
    owner, name, *file = parts[1:] if kind else parts
    folder = part.with_suffix(".hub")
    where = {"filename": "/".join(file), "repo_type": kind, "local_dir": folder}
    try:
        os.replace(ask_hub(hf_hub_download, f"{owner}/{name}", **where), part)
        return part
    finally:
        if not any(folder.rglob("*.incomplete")):  # which the Hub's library continues
            shutil.rmtree(folder, ignore_errors=True)


@retry(
    retry=retry_if_exception_type(_PassingError),
    stop=stop_after_attempt(5),
    wait=wait_exponential(max=60),
    reraise=True,
)
def _go_on(url: str, part: Path) -> Path:
    """Complete `part` by one request: for the rest of what is there, or for all of it."""
    offset = part.stat().st_size if part.is_file() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416:  # nothing is left, or the file has become shorter
                part.unlink()
                raise _PassingError(f"has no byte {offset:,}: starting anew")
            total = _length(response, offset)
            check_space(part.parent, (total or 0) - offset, f"downloading {url}")
            with part.open("ab" if response.status_code == 206 else "wb") as file:
                bar = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
                with tqdm(total=total, initial=file.tell(), desc=part.stem, **bar) as progress:
                    for block in response.iter_content(1 << 16):
                        progress.update(file.write(block))
    except requests.exceptions.InvalidURL as error:
        raise UnfitError(f"is no address ({error})") from None
    except requests.RequestException as error:
        raise _PassingError(f"the connection failed ({error})") from None
    except OSError as error:
        error.filename = error.filename or str(part)
        raise
    if total not in (None, reached := part.stat().st_size):
        raise _PassingError(f"the answer ended after {reached:,} of {total:,} bytes")
    return part


def _length(response: requests.Response, offset: int) -> int | None:
    """Return how many bytes the file has, if that is told; refuse what is not the file."""
    code, headers = response.status_code, response.headers
    if code not in (200, 206):
        kind = _PassingError if code in PASSING else UnfitError
        raise kind(f"HTTP {code} {response.reason}")
    if "html" in headers.get("Content-Type", ""):
        raise UnfitError("answers with a web page, not with the file")
    span, _, total = headers.get("Content-Range", "").partition("/")
    if code == 206 and not span.startswith(f"bytes {offset}-"):
        raise UnfitError("answers with another part than was asked for")
    total = total if code == 206 else headers.get("Content-Length", "")
    return int(total) if total.isdecimal() else None
