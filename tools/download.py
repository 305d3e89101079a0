"""Get a published file from the first address that has it, and unpack archives.

A file lies beside its place, with `.part` in its name, until it is whole and checked; the same
command goes on with it.
"""

import hashlib
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import IO, Any

import requests
from huggingface_hub import hf_hub_download
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential
from tqdm import tqdm

from utils.errors import UserError
from utils.files import staging_folder

TIMEOUT = 30.0  # seconds without a byte
PASSING = {408, 416, 425, 429, 500, 502, 503, 504}  # HTTP answers that may be another one soon


class UnfitError(UserError):
    """Tells that an address does not give the file that was asked for; the text says why."""


class _PassingError(UnfitError):
    """Tells of a failure that may pass: the same address is asked again."""


def fetch(sources: Sequence[str], path: Path, check: Callable[[Path], object]) -> None:
    """Check a file; if it is missing, get it from the first source that has it.

    Args:
        sources: paths, which are linked to, `https://...` or `hf:...`, in order.
        check: raises UnfitError for another file.
    Raises:
        UserError: none had it; the text gives the reason of each.
    """
    if path.is_file():
        return check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, reasons = path.with_stem(f"{path.stem}.part"), {}
    for source in sources:
        # What another source or an earlier call has begun may be of another file.
        for _ in range(2 if part.is_file() else 1):
            try:
                here = _get(source, part)
                check(here)
                return os.replace(here, path) if here == part else path.symlink_to(here)
            except UnfitError as reason:
                reasons[source] = f"{source}: {reason}"
                print(f"  {reasons[source]}")
                if not isinstance(reason, _PassingError):
                    part.unlink(missing_ok=True)
    raise UserError(
        f"{path.name} could not be had ({'; '.join(reasons.values())}): get it in another way, put "
        "it into a folder and pass --from FOLDER, or name an address with --mirror"
    )


def check_file(path: Path, size: int | None, sha256: str, witnesses: int = 2) -> None:
    """Raise UnfitError for another file than this; a digest with one witness only warns."""
    found = path.stat().st_size
    if size not in (None, found):
        raise UnfitError(f"{path} has {found:,} bytes, not {size:,}: get it again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        told = f"{path} has SHA-256 {digest}, not {sha256}"
        if witnesses > 1:
            raise UnfitError(f"{told}: get it again")
        print(f"  warning: {told}, which one source states")


def names_in(path: Path) -> set[str]:
    """Return the names, without folders, of the files in a zip or tar archive."""
    with _opened(path) as files:
        return set(files)


def unpack(path: Path, target: Path) -> None:
    """Unpack the files of a zip or tar archive, but not its folders, as a new folder.

    Whatever the files are called, nothing is written elsewhere. The folder appears complete.
    """
    with staging_folder(target) as staging, _opened(path) as files:
        check_space(target, sum(size for size, _ in files.values()), f"unpacking {path}")
        bar = tqdm(files.items(), desc=f"unpack {path.name}", disable=None, leave=False)
        for name, (_, open_file) in bar:
            with open_file() as file, (staging / name).open("wb") as copy:
                shutil.copyfileobj(file, copy)
        os.replace(staging, target)


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, tuple[int, Callable[[], IO[bytes]]]]]:
    """Give the size of each file in an archive, and what opens it, by its name without folders.

    UnfitError tells that it is no archive, or that what is read of it is damaged.
    """
    try:
        with zipfile.ZipFile(path) if path.suffix == ".zip" else tarfile.open(path) as archive:
            if isinstance(archive, zipfile.ZipFile):
                found = [entry for entry in archive.infolist() if not entry.is_dir()]
                files = [(e.filename, e.file_size, partial(archive.open, e)) for e in found]
            else:
                found = [entry for entry in archive if entry.isfile()]
                files = [(e.name, e.size, partial(archive.extractfile, e)) for e in found]
            # Nobody needs hidden files; a system may have left one in each folder.
            named = [(PurePath(name).name, file) for name, *file in files]
            named = [(name, file) for name, file in named if not name.startswith(".")]
            if len(dict(named)) < len(named):
                raise UnfitError(f"{path} has files of the same name in several folders")
            yield dict(named)
    except Exception as error:  # what reads foreign bytes can stumble in any way
        if isinstance(error, UserError) or getattr(error, "errno", None) is not None:
            raise
        reason = " ".join(str(error).split())
        raise UnfitError(f"{path} is no whole archive ({reason}): get it again") from None


def check_space(folder: Path, need: int, what: str) -> None:
    """Raise UserError if `need` bytes do not fit where a folder is, or will be."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if need > free:
        told = f"{what} needs about {need / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are"
        raise UserError(f"{told} free: make room, or give another folder")


def ask_hub(download: Callable[..., str], repository: str, **what: Any) -> str:
    """Call one of huggingface_hub's downloads; UnfitError tells that it failed."""
    try:
        return download(repository, endpoint=os.environ.get("HF_ENDPOINT"), **what)
    except (requests.RequestException, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        told = f"{repository} could not be downloaded ({reason}): get it elsewhere"
        raise UnfitError(f"{told}, and pass --from FOLDER") from None


def _get(source: str, part: Path) -> Path:
    """Return a file of this machine, or `part`, completed from an address."""
    if source.startswith(("http://", "https://")):
        return _go_on(source, part)
    if not source.startswith("hf:"):
        if not Path(source).is_file():
            raise UnfitError("there is no such file")
        return Path(source).resolve()
    is_data, repository, name = re.fullmatch("hf:(datasets/)?([^/]+/[^/]+)/(.+)", source).groups()
    kind, folder = "dataset" if is_data else "model", part.with_suffix(".hub")
    what = {"filename": name, "repo_type": kind, "local_dir": folder}
    try:
        os.replace(ask_hub(hf_hub_download, repository, **what), part)
        return part
    finally:
        if not any(folder.rglob("*.incomplete")):  # which the Hub's library continues
            shutil.rmtree(folder, ignore_errors=True)


@retry(
    retry=retry_if_exception_type(_PassingError),
    stop=stop_after_attempt(5),
    wait=wait_exponential(),
    reraise=True,
)
def _go_on(url: str, part: Path) -> Path:
    """Complete `part` by one request: for the rest of what is there, or for all of it."""
    offset = part.stat().st_size if part.is_file() else 0
    asked = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        with requests.get(url, headers=asked, stream=True, timeout=TIMEOUT) as response:
            code, headers = response.status_code, response.headers
            if code == 416:  # nothing is left, or the file has become shorter
                part.unlink(missing_ok=True)
            if code not in (200, 206):
                kind = _PassingError if code in PASSING else UnfitError
                raise kind(f"HTTP {code} {response.reason}")
            if "html" in headers.get("Content-Type", ""):
                raise UnfitError("answers with a web page, not with the file")
            if code == 206 and not headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
                raise UnfitError("answers with another part than was asked for")
            left = int(headers.get("Content-Length", 0))
            check_space(part.parent, left, f"downloading {url}")
            bar = {"total": left or None, "desc": part.stem, "disable": None, "leave": False}
            with (
                part.open("ab" if code == 206 else "wb") as file,
                tqdm.wrapattr(file, "write", **bar) as shown,
            ):
                for block in response.iter_content(1 << 16):
                    shown.write(block)
    except requests.RequestException as error:  # a body that is too short, too
        raise _PassingError(f"the connection failed ({error})") from None
    except OSError as error:
        error.filename = error.filename or str(part)
        raise
    return part
