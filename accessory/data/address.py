"""URLs taken apart, and the addresses that may be connected to: none inside a host or a network unless it is allowed.
Knows no HTTP and opens no connection.

Whoever connects takes the addresses from here and asks no name server again, so that a name which changes its answer
(DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import quote, urlsplit, urlunsplit

PORTS = {"http": 80, "https": 443}
LONGEST = 8192  # characters of a URL
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_MARKS = "!$&'()*+,;=:@/-._~%"  # that stay as they are in a path

_CLOSED = [
    ipaddress.ip_network(block)
    for block in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carriers' translation, and one cloud's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # a cloud's own services
        "169.254.0.0/16",  # link-local, and most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocols
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "2001::/23",  # protocols, Teredo
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
]
_GLOBAL6 = ipaddress.IPv6Network("2000::/3")
_MAPPED, _NAT64, _6TO4 = (ipaddress.IPv6Network(block) for block in ("::ffff:0:0/96", "64:ff9b::/96", "2002::/16"))

Address = tuple[int, tuple[str, int] | tuple[str, int, int, int]]
"""Family and socket address, as connect takes them."""


class UnknownHost(OSError):
    """A name that no server knows, or that none tells now."""

    def __init__(self, sentence: str, *, final: bool) -> None:
        super().__init__(sentence)
        self.final = final
        """Whether asking again is of no use."""


@dataclass(frozen=True)
class Place:
    """A URL taken apart."""

    scheme: str
    host: str
    """ASCII, lower case, an IPv6 address without brackets."""
    port: int
    target: str
    """Path and query as they are asked for."""

    @property
    def authority(self) -> str:
        """The Host header: the port stands there where it is not the scheme's."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """All of it again, without a fragment."""
        return f"{self.scheme}://{self.authority}{self.target}"


def shown(url: str) -> str:
    """A URL for a sentence: what may be secret (query, user, password) is left out, and it is short."""
    try:
        parts = urlsplit(url)
        text = urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path, "", ""))
    except ValueError:
        text = url.split("?")[0]
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return (text if len(text) <= 100 else f"{text[:70]}...{text[-27:]}") + ("?..." if "?" in url else "")


def take_apart(url: str, *, allow_private: bool = False) -> Place:
    """The parts of an http or https URL. ValueError that names it for anything that two readers may read differently,
    for a user name in it, and for the ports of other services (below 1024, unless allow_private)."""
    name, url = shown(url), url.strip()
    if len(url) > LONGEST:
        raise ValueError(f"{name}: got a URL of {len(url)} characters, expected at most {LONGEST}; shorten it")
    if "\\" in url or any(ord(letter) < 0x20 or ord(letter) == 0x7F for letter in url):
        raise ValueError(f"{name}: holds a backslash or a control character, which no URL has; mend it")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{name}: is no URL ({error}); mend it") from None
    if parts.scheme not in PORTS:
        raise ValueError(f"{name}: got the scheme {parts.scheme!r}, expected http or https; use such a URL, or a path")
    if "@" in parts.netloc:
        raise ValueError(f"{name}: holds a user name, expected none; give a URL that needs no login")
    port = PORTS[parts.scheme] if port is None else port
    if port == 0 or (port < 1024 and port not in PORTS.values() and not allow_private):
        raise ValueError(f"{name}: got port {port}, expected 80, 443 or one above 1023; use such a port")
    target = quote(parts.path or "/", safe=_MARKS) + (
        "?" + quote(parts.query, safe=_MARKS + "?") if parts.query else ""
    )
    return Place(parts.scheme, _ascii(host, name), port, target)


def resolve(place: Place, *, allow_private: bool = False) -> list[Address]:
    """The addresses of a place, each checked. ValueError where any of them is not public (unless allow_private), since
    an answer that mixes both is an attack or a mistake; UnknownHost where there is none."""
    try:
        answers = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        final = getattr(error, "errno", None) != socket.EAI_AGAIN
        raise UnknownHost(f"the host {place.host} is not found ({reason})", final=final) from error
    for answer in answers:
        address = str(answer[4][0])
        if not allow_private and not is_public(address):
            raise ValueError(
                f"{shown(place.url)}: its host has the address {address}, which is not public; use a public host, or"
                " set allow_private_urls"
            )
    return list(dict.fromkeys((int(answer[0]), answer[4]) for answer in answers))


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, by IANA's registries of special addresses.

    IPv6 addresses that stand for an IPv4 address (mapped, NAT64, 6to4) are judged by that one.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # with the zone of a link, or none at all
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _MAPPED or found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found in _6TO4:
            return is_public(str(ipaddress.IPv4Address(int(found) >> 80 & 0xFFFFFFFF)))
        if found not in _GLOBAL6:
            return False
    return not any(found in block for block in _CLOSED if block.version == found.version)


def _ascii(host: str | None, name: str) -> str:
    """A host as name servers and certificates know it."""
    if not host:
        raise ValueError(f"{name}: names no host; write https://host/path")
    if ":" in host and "%" not in host:
        try:
            return ipaddress.IPv6Address(host).compressed
        except ValueError:
            raise ValueError(f"{name}: got the host {host!r:.60}, which is no address; mend it") from None
    try:
        plain = host.encode("ascii" if host.isascii() else "idna").decode().lower().rstrip(".")
    except UnicodeError:
        plain = ""
    if not _HOST.fullmatch(plain):
        raise ValueError(f"{name}: got the host {host!r:.60}, which is no name; mend it")
    return plain
