"""Files from elsewhere, fetched once into a folder that outlives a killed stage, and resumed where that broke off.

No secret is kept or shown: a URL holds `${NAME}` where an environment variable belongs, which is filled in only to ask
for the file, and taken out again of whatever the answer is. Retrying is our own rather than tenacity's, which counts
attempts from the first: here each byte that comes starts the count anew, and a server may say how long to wait.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from adder.core import file_lock
from adder.core.errors import UserError
from adder.core.files import sha256_file
from adder.core.progress import Progress
from adder.core.secrets import filled_in, refuse_secrets, without_secrets

if TYPE_CHECKING:
    from requests import PreparedRequest

CHUNK = 1 << 20  # bytes
ATTEMPTS = 5  # in a row without a new byte
FIRST_WAIT = 1.0  # seconds before the second attempt; doubled each time
LONGEST_WAIT = 60.0
TIMEOUT = (15, 60)  # seconds to connect, and between two bytes
RETRIED = {408, 425, 429, 500, 502, 503, 504}
DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}


Authorize = Callable[["PreparedRequest"], "PreparedRequest"]


class _TryAgain(Exception):
    """An answer that may be another one later; `wait` is how many seconds the server asks for, if it does."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def downloads() -> Path:
    """The folder of fetched files: ADDER_DOWNLOADS, else `~/.cache/adder/downloads`."""
    return Path(os.environ.get("ADDER_DOWNLOADS") or Path.home() / ".cache" / "adder" / "downloads")


def fetch(url: str, where: str, progress: Progress, sha256: str | None = None, token_env: str | None = None) -> Path:
    """Fetch the file at `url` and return its local path; one that is there and unchanged is not fetched again.

    url: as it is configured, with `${NAME}` for environment variables. token_env: the environment variable with the
    token. Raises UserError with what to do about it, naming `where` the setting is; the file is not kept where its
    SHA-256 is another than expected.
    """
    refuse_secrets(url, where)
    address, secrets = filled_in(url, where)
    token = _token(token_env, where)
    secrets |= {token: f"${{{token_env}}}"} if token else {}
    by_http = urlsplit(address).scheme in ("http", "https")
    if token and not by_http:
        raise UserError(f"{where}: `token_env` goes with http and https; {url} has credentials of another kind")
    target = _place(url, address)

    def busy(who: str) -> None:
        progress.say(f"{who} is fetching {url}; waiting for it")

    try:
        with file_lock.held(_beside(target, ".lock"), busy):
            if sha256 and target.exists() and sha256_file(target) == sha256:
                return target
            if by_http:
                _fetch_http(address, token, target, url, where, progress)
            else:
                _fetch_fsspec(address, target, url, where, progress)
            if sha256 and (found := sha256_file(target)) != sha256:
                _forget(target)
                raise UserError(
                    f"{where}: {url} has SHA-256 {found}, expected {sha256}. The file is damaged or another one than "
                    "was pinned; it is not kept."
                )
    except UserError:
        raise
    except Exception as error:
        # Not chained: the cause may hold the address with its secrets.
        raise UserError(f"{where}: {url} can't be fetched: {without_secrets(error, secrets)}") from None
    return target


def named_after(url: str) -> tuple[str, ...]:
    """The parts of a URL that can name its file, last the file's name; variables are not filled in."""
    parts = urlsplit(url)
    path = [unquote(part) for part in PurePosixPath(parts.path).parts if part != "/"]
    return (parts.netloc.rpartition("@")[2], *path) if path else (parts.netloc.rpartition("@")[2] or "data",)


def _token(variable: str | None, where: str) -> str | None:
    if variable and not os.environ.get(variable):
        raise UserError(f"{where}: `token_env: {variable}`: this environment variable is not set")
    return os.environ[variable] if variable else None


def _place(url: str, address: str) -> Path:
    """Where a file is kept. A variable in host or path stands for another file, in user and query for a key to it."""
    parts = urlsplit(address)
    what = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}?{urlsplit(url).query}"
    key = hashlib.blake2b(what.encode(), digest_size=10).hexdigest()
    name = re.sub(r"[^\w.-]", "_", named_after(url)[-1])[-100:]
    return downloads() / f"{key}-{name}"


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


def _forget(target: Path) -> None:
    for path in (target, _beside(target, ".json"), _beside(target, ".part"), _beside(target, ".part.json")):
        path.unlink(missing_ok=True)


class _Partial:
    """The part of a file that is here, with the mark by which its origin knows the content that it is a part of."""

    def __init__(self, target: Path) -> None:
        self.target, self.path, self.note = target, _beside(target, ".part"), _beside(target, ".part.json")

    @property
    def size(self) -> int:
        """Bytes that are here."""
        return self.path.stat().st_size if self.path.exists() else 0

    def mark(self, finished: bool = False) -> str | None:
        """The mark of the part, or of the finished file from an earlier time."""
        note = _beside(self.target, ".json") if finished else self.note
        try:
            return json.loads(note.read_text())["mark"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, mark: str | None) -> None:
        """Start over with nothing, of the content that has this mark."""
        self.path.unlink(missing_ok=True)
        self.note.write_text(json.dumps({"mark": mark}))

    def write(self, chunks: Iterator[bytes], total: int | None, shown: str, progress: Progress) -> None:
        """Append what comes; `total`: bytes of the whole file, where its origin tells."""
        done = self.size
        of_all = f" of {total / 1e6:,.1f}" if total else ""
        with self.path.open("ab") as file:
            for chunk in chunks:
                file.write(chunk)
                done += len(chunk)
                progress.line(f"fetching {shown}: {done / 1e6:,.1f}{of_all} MB")

    def finish(self) -> None:
        """Make the part the file."""
        self.path.replace(self.target)
        self.note.replace(_beside(self.target, ".json"))


def _fetch_http(address: str, token: str | None, target: Path, shown: str, where: str, progress: Progress) -> None:
    """Fetch by HTTP, again and again from where the connection broke, until no attempt brings another byte."""
    import requests
    import urllib3

    broken = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    partial = _Partial(target)
    progress.say(f"fetching {shown}")
    most, failures = partial.size, 0
    while True:
        try:
            return _ask_http(address, token, partial, shown, where, progress)
        except (*broken, urllib3.exceptions.HTTPError, _TryAgain) as error:
            failures = 0 if partial.size > most else failures + 1
            most = max(most, partial.size)
            what = str(error) if isinstance(error, _TryAgain) else type(error).__name__
            if failures >= ATTEMPTS:
                if target.exists():
                    progress.note(f"{shown} is out of reach ({what}): taking the copy that was fetched before")
                    return
                if isinstance(error, _TryAgain):
                    raise UserError(f"{where}: {shown} can't be fetched: {what}, {failures} times in a row") from None
                raise
            wait = min(max(FIRST_WAIT * 2 ** max(failures - 1, 0), getattr(error, "wait", 0.0)), LONGEST_WAIT)
            progress.say(f"{shown}: {what} after {partial.size:,} bytes; trying again in {wait:g} s")
            time.sleep(wait)


def _ask_http(address: str, token: str | None, partial: _Partial, shown: str, where: str, progress: Progress) -> None:
    """One request: the whole file, what is missing of it, or the answer that it is unchanged."""
    import requests

    have, mark = partial.size, partial.mark()
    headers = {"Accept-Encoding": "identity"}  # the file's own bytes, of which a part can be asked for
    if have and mark:
        headers |= {"Range": f"bytes={have}-", "If-Range": mark}
    elif partial.target.exists() and (known := partial.mark(finished=True)):
        headers["If-None-Match" if '"' in known else "If-Modified-Since"] = known
    url, auth = _credentials(address, token)
    with requests.get(url, headers=headers, auth=auth, stream=True, timeout=TIMEOUT) as response:
        status = response.status_code
        if status == 304:
            return
        if status in RETRIED:
            wait = response.headers.get("Retry-After", "")
            raise _TryAgain(f"HTTP {status}", float(wait) if wait.isdigit() else 0.0)
        resumed = status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if status == 416 or (status == 206 and not resumed):
            partial.path.unlink(missing_ok=True)
            raise _TryAgain(f"HTTP {status}, another part than was asked for")
        if status >= 300:
            raise UserError(f"{where}: {shown} can't be fetched: {_meaning(status)}")
        length = response.headers.get("Content-Length", "")
        total = int(length) + (have if resumed else 0) if length.isdigit() else None
        if not resumed:
            etag = response.headers.get("ETag", "")
            # Only a strong ETag or a date tells that the rest belongs to the same content (RFC 9110, If-Range).
            partial.begin(etag if etag.startswith('"') else response.headers.get("Last-Modified"))
        partial.write(response.raw.stream(CHUNK, decode_content=False), total, shown, progress)
    partial.finish()


def _credentials(address: str, token: str | None) -> tuple[str, Authorize]:
    """The URL without user and password, and what sends them, or the token, to this host and no other."""
    from requests.auth import HTTPBasicAuth

    parts = urlsplit(address)
    user, _, host = parts.netloc.rpartition("@")
    if token:
        return parts._replace(netloc=host).geturl(), _Bearer(token)
    if user:
        name, _, password = user.partition(":")
        return parts._replace(netloc=host).geturl(), HTTPBasicAuth(unquote(name), unquote(password))
    return address, lambda request: request  # not None, for which requests would look into ~/.netrc


class _Bearer:
    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: "PreparedRequest") -> "PreparedRequest":
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


def _meaning(status: int) -> str:
    if status in (401, 403):
        return f"HTTP {status}, access refused; `token_env` can name an environment variable with a token for it"
    return f"HTTP {status}, no such file there" if status in (404, 410) else f"HTTP {status}"


def _fetch_fsspec(address: str, target: Path, shown: str, where: str, progress: Progress) -> None:
    """Fetch by whichever driver fsspec has for this kind of address; drivers try again by themselves."""
    import fsspec

    scheme = urlsplit(address).scheme
    try:
        system, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise UserError(
            f"{where}: {scheme}:// needs a package that is not installed: pip install {DRIVERS.get(scheme, error)}"
        ) from None
    except ValueError:
        known = "http, https, s3, gs, and what else fsspec opens"
        raise UserError(f"{where}: {shown} is no address that can be opened ({known})") from None
    try:
        size, mark = system.info(path)["size"], system.ukey(path)
    except FileNotFoundError:
        raise UserError(f"{where}: there is no file {shown}") from None
    partial = _Partial(target)
    if target.exists() and partial.mark(finished=True) == mark:
        return
    progress.say(f"fetching {shown}")
    if partial.mark() != mark:
        partial.begin(mark)
    with system.open(path, "rb") as file:
        if partial.size:
            file.seek(partial.size)
        partial.write(iter(lambda: file.read(CHUNK), b""), size, shown, progress)
    if size is not None and (found := partial.size) != size:
        if found > size:  # never of any use
            partial.path.unlink()
        raise EOFError(f"{found:,} bytes came of {size:,}")
    partial.finish()
