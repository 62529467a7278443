"""The bytes behind a public http(s) URL, within limits of time and size, tried again where that helps, kept on disk.
Knows no pictures, and asks no proxy: the address that was checked is the one that is connected to.

RFC 9110 and 9112 through http.client; certificates are checked against the host's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import logging
import os
import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urljoin

from accessory.data.address import Place, UnknownHost, resolve, shown, take_apart

log = logging.getLogger(__name__)

DAY = 86400.0  # seconds
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_SWEPT = 3600.0  # seconds between two looks at the size of the cache
_DIGEST = 32  # bytes of SHA-256 before what is kept


@dataclass(frozen=True)
class Limits:
    """What a fetch may cost."""

    connect: float = 10.0
    """Seconds to reach one address, TLS included."""
    read: float = 20.0
    """Seconds without a byte."""
    total: float = 120.0
    """Seconds of one try, with all its redirects."""
    size: int = 64 << 20
    """Bytes of the body."""
    hops: int = 4
    """Redirects."""
    waits: tuple[float, ...] = (0.5, 2.0)
    """Seconds before each further try."""
    kept: int = 20 << 30
    """Bytes of the cache; what was not used for longest goes first."""
    age: float = 90 * DAY
    """Seconds after which what nobody used goes."""


LIMITS = Limits()


class _Passing(Exception):
    """What may be over when it is tried again."""


def cache_home() -> Path:
    """The folder of what was fetched, where no other is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accessory" / "pictures"


def fetch(
    url: str, *, allow_private: bool = False, cache: str | Path | None = None, limits: Limits | None = None
) -> bytes:
    """The body of a URL, from the cache or by GET.

    allow_private: hosts that are not public are fetched from, too. cache: folder; none: `cache_home()`. limits: none:
    `LIMITS`. Raises ValueError that names the URL where it must not be fetched, leads nowhere or is too large, and
    ConnectionError where the host is unknown or gave no answer in all tries.
    """
    limits = limits or LIMITS
    key = hashlib.sha256(f"{'any' if allow_private else 'public'} {url.strip()}".encode()).hexdigest()
    home = Path(cache) if cache is not None else cache_home()
    kept = home / key[:2] / key
    data = _read(kept)
    if data is not None and len(data) <= limits.size:
        return data
    data = _insist(url, allow_private, limits)
    _keep(kept, data)
    _sweep_at_times(home, limits)
    return data


def sweep(home: Path, limits: Limits) -> int:
    """Remove from a cache what is old, then what was not used for longest, until it fits. Returns how many went."""
    entries = []
    for path in home.glob("??/*"):
        with contextlib.suppress(OSError):  # somebody else removed it
            state = path.stat()
            entries.append((state.st_mtime, state.st_size, path))
    entries.sort()
    left, gone, now = sum(size for _, size, _ in entries), 0, time.time()
    for changed, size, path in entries:
        if left <= limits.kept and now - changed <= limits.age:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            left, gone = left - size, gone + 1
    return gone


def _insist(url: str, allow_private: bool, limits: Limits) -> bytes:
    """Try until it works, or no try is left."""
    for wait in (*limits.waits, None):
        try:
            return _follow(url, allow_private, limits)
        except _Passing as error:
            if wait is None:
                tries = f"{len(limits.waits) + 1} times" if limits.waits else "once"
                raise ConnectionError(
                    f"{shown(url)}: {error}, tried {tries}; check the URL and the network"
                ) from error.__cause__
            time.sleep(wait)
    raise AssertionError(f"no try of {url}")


def _follow(url: str, allow_private: bool, limits: Limits) -> bytes:
    """One try: the URL, and where it redirects to; each hop is checked as the first one is."""
    end, at = time.monotonic() + limits.total, url
    for _ in range(limits.hops + 1):
        try:
            place = take_apart(at, allow_private=allow_private)
            found = _get(place, allow_private, limits, end)
        except ValueError as error:
            raise ValueError(str(error) if at == url else f"{shown(url)}: redirects to {error}") from error
        if isinstance(found, bytes):
            return found
        at = urljoin(place.url, found)
    raise ValueError(f"{shown(url)}: redirects more than {limits.hops} times; give the URL it leads to")


def _get(place: Place, allow_private: bool, limits: Limits, end: float) -> bytes | str:
    """The body at a place, or where it redirects to."""
    name = shown(place.url)
    try:
        with _connect(place, allow_private, limits, end) as pipe:
            pipe.sendall(_request(place))
            answer = http.client.HTTPResponse(_Timed(pipe, limits, end), method="GET")  # type: ignore[arg-type]
            answer.begin()
            if answer.status in _REDIRECTS and answer.headers.get("Location"):
                return answer.headers["Location"]
            if answer.status in _BUSY:
                raise _Passing(f"answers {answer.status} {answer.reason}".rstrip())
            if answer.status != 200:
                raise ValueError(f"{name}: answers {answer.status} {answer.reason}, expected 200; check the URL")
            if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise ValueError(f"{name}: comes compressed though that was not asked for; fetch it by hand")
            return b"".join(_body(answer, name, limits))
    except ssl.SSLCertVerificationError as error:
        raise ValueError(f"{name}: its certificate is not trusted ({error.verify_message}); check the host") from error
    except UnknownHost as error:
        if error.final:
            raise ConnectionError(f"{name}: {error}; check the URL and the network") from error
        raise _Passing(str(error)) from error
    except TimeoutError as error:
        raise _Passing("gave no full answer in time") from error
    except (OSError, http.client.HTTPException) as error:
        words = getattr(error, "strerror", None) or error or type(error).__name__
        raise _Passing(f"cannot be read ({' '.join(str(words).split())[:120]})") from error


def _body(answer: http.client.HTTPResponse, name: str, limits: Limits) -> Iterator[bytes]:
    """The body in pieces; ValueError as soon as it is too large."""
    got, told = 0, answer.length
    too_large = f"{name}: has more than {limits.size} bytes; make it smaller"
    if told is not None and told > limits.size:
        raise ValueError(too_large)
    while True:
        try:
            piece = answer.read(1 << 16)
        except ValueError as error:  # a chunk of a length that is none
            raise _Passing("is broken off by a chunk that is none") from error
        got += len(piece)
        if got > limits.size:
            raise ValueError(too_large)
        if not piece:
            break
        yield piece
    if told is not None and got < told:
        raise _Passing(f"ended after {got} of {told} bytes")


def _request(place: Place) -> bytes:
    """A GET request."""
    lines = (
        f"GET {place.target} HTTP/1.1",
        f"Host: {place.authority}",
        "User-Agent: accessory",
        "Accept: image/*, */*;q=0.5",
        "Accept-Encoding: identity",
        "Connection: close",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def _connect(place: Place, allow_private: bool, limits: Limits, end: float) -> socket.socket:
    """A connection to the first of the checked addresses that answers."""
    failed: OSError = OSError("no address")
    for family, address in resolve(place, allow_private=allow_private):
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("too late")
        pipe = socket.socket(family, socket.SOCK_STREAM)
        try:
            pipe.settimeout(min(limits.connect, left))
            pipe.connect(address)
            return _tls().wrap_socket(pipe, server_hostname=place.host) if place.scheme == "https" else pipe
        except OSError as error:
            pipe.close()
            failed = error
    raise failed


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """Certificates that this host trusts."""
    return ssl.create_default_context()


class _Timed(io.RawIOBase):
    """What a socket receives, until a limit of time or of bytes, whatever the answer says of its length."""

    def __init__(self, pipe: socket.socket, limits: Limits, end: float) -> None:
        self._pipe, self._limits, self._end = pipe, limits, end
        self._left = 2 * limits.size + (1 << 20)  # headers and the sizes of chunks come with the body

    def makefile(self, mode: str) -> io.BufferedReader:
        """What http.client asks a socket for."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("too late")
        self._pipe.settimeout(min(self._limits.read, left))
        got = self._pipe.recv_into(buffer)
        self._left -= got
        if self._left < 0:
            raise OSError("far more bytes than its limit")
        return got


def _read(kept: Path) -> bytes | None:
    """What the cache has; a damaged entry is none."""
    try:
        whole = kept.read_bytes()
        with contextlib.suppress(OSError):  # somebody else's cache, read-only
            if time.time() - kept.stat().st_mtime > _SWEPT:
                os.utime(kept)  # it is used
    except FileNotFoundError:
        return None
    except OSError as error:
        log.debug("%s: not read from the cache: %s", kept, error)
        return None
    digest, data = whole[:_DIGEST], whole[_DIGEST:]
    return data if hashlib.sha256(data).digest() == digest else None


def _keep(kept: Path, data: bytes) -> None:
    """Write to the cache, whole or not at all; without room for it the run goes on."""
    temporary = kept.with_name(f".{kept.name[:16]}.{secrets.token_hex(4)}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(hashlib.sha256(data).digest() + data)
        os.replace(temporary, kept)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _warn_once(str(kept.parents[1]), str(error.strerror or error))


@lru_cache(maxsize=8)
def _warn_once(home: str, reason: str) -> None:
    """Say that nothing is kept."""
    log.warning("what is fetched is not kept: %s: %s", home, reason)


def _sweep_at_times(home: Path, limits: Limits) -> None:
    """Sweep, if nobody did within the hour."""
    mark = home / "swept"
    with contextlib.suppress(OSError):
        if not mark.exists() or time.time() - mark.stat().st_mtime > _SWEPT:
            mark.touch()
            sweep(home, limits)
