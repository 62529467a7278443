"""URLs of pictures: which hosts are never asked, limits of time and size, tries, redirects, the cache.

Must not need a network beyond loopback.
"""

import hashlib
import io
import os
import socket
import ssl
import time
from dataclasses import replace

import pytest
from PIL import Image
from web import serve

from accessory.data import fetch as module
from accessory.data.address import is_public, resolve, shown, take_apart
from accessory.data.fetch import Limits, fetch, sweep
from accessory.data.image import load_picture

QUICK = Limits(connect=2.0, read=2.0, total=5.0, waits=(0.0, 0.0))


@pytest.fixture
def web():
    with serve() as found:
        yield found


@pytest.fixture
def get(tmp_path):
    """fetch, from loopback, into a cache of its own."""

    def go(url: str, **more):
        limits = replace(QUICK, **more.pop("limits", {}))
        return fetch(url, **{"allow_private": True, "cache": tmp_path / "cache", "limits": limits, **more})

    return go


def png(size=(5, 4), colour="red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def names(monkeypatch, **hosts: list[str]) -> list[str]:
    """A name server that knows these hosts; what it was asked. A host's addresses are answered once each."""
    asked, real = [], socket.getaddrinfo

    def lookup(host, port, *args, **more):
        if host not in hosts:
            return real(host, port, *args, **more)
        asked.append(host)
        found = hosts[host]
        now = found.pop(0) if isinstance(found[0], list) else found
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in now
        ]

    monkeypatch.setattr("accessory.data.address.socket.getaddrinfo", lookup)
    return asked


# ---- which hosts


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "100.100.100.200",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2002:c0a8:101::1",
        "2001:0:1::1",
        "2001:db8::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "no address",
    ],
)
def test_addresses_inside_a_host_or_a_network_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "93.184.216.34",
        "172.32.0.1",
        "2606:4700::1111",
        "::ffff:1.1.1.1",
        "64:ff9b::101:101",
        "2002:101:101::",
    ],
)
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "[::1]",
        "localhost",
        "localhost.",
        "169.254.169.254",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0",
        "[::ffff:127.0.0.1]",
        "[0:0:0:0:0:ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:0001::]",
    ],
)
def test_every_spelling_of_a_host_that_is_not_public_is_refused_before_any_connection(host, tmp_path, monkeypatch):
    monkeypatch.setattr("accessory.data.fetch.socket.socket", None)
    names(monkeypatch, **{one: ["127.0.0.1"] for one in ("localhost",)})
    with pytest.raises(ValueError, match=r"which is not public; use a public host, or set allow_private_urls$"):
        fetch(f"http://{host}/a.png", cache=tmp_path)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "got the scheme 'file'"),
        ("gopher://host/1", "got the scheme 'gopher'"),
        ("ftp://host/a.png", "expected http or https"),
        ("//host/a.png", "got the scheme ''"),
        ("http://user@host/a.png", "holds a user name"),
        ("http://user:secret@host/a.png", "holds a user name"),
        ("http://public.example@127.0.0.1/", "holds a user name"),
        ("http://public.example\\@127.0.0.1/", "backslash"),
        ("http://public.example\\.evil/", "backslash"),
        ("http://host/a\r\nHost: other", "control character"),
        ("http://host/\x00", "control character"),
        ("http://", "names no host"),
        ("http:///a.png", "names no host"),
        ("http:a.png", "names no host"),
        ("http://ho st/a.png", "which is no name"),
        ("http://127.0.0.1%2f/a.png", "which is no name"),
        ("http://[fe80::1%25eth0]/a.png", "is no URL|no name"),
        ("http://[::1/a.png", "is no URL"),
        ("http://host:99999/", "is no URL"),
        ("http://host:x/", "is no URL"),
        ("http://host:0/", "got port 0"),
        ("http://host:22/", "got port 22"),
        ("https://host:25/", "expected 80, 443 or one above 1023"),
        ("http://host/" + "a" * 9000, "expected at most 8192"),
    ],
)
def test_urls_that_may_be_read_in_two_ways_or_name_another_service_are_refused(url, said, tmp_path):
    with pytest.raises(ValueError, match=said) as caught:
        fetch(url, cache=tmp_path, limits=QUICK)
    text = str(caught.value)
    assert "\n" not in text and "\r" not in text and "secret" not in text and len(text) < 300


def test_a_host_with_one_public_and_one_private_address_is_refused(monkeypatch, tmp_path):
    names(monkeypatch, mixed=["1.1.1.1", "10.0.0.1"])
    with pytest.raises(ValueError, match=r"has the address 10\.0\.0\.1"):
        fetch("http://mixed/a.png", cache=tmp_path)


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(monkeypatch, tmp_path):
    asked = names(monkeypatch, rebinds=[["1.1.1.1"], ["127.0.0.1"], ["127.0.0.1"]])
    reached = []

    class Pipe:
        def __init__(self, *_):
            pass

        def settimeout(self, _):
            pass

        def connect(self, address):
            reached.append(address)
            raise ConnectionRefusedError(111, "refused")

        def close(self):
            pass

    monkeypatch.setattr("accessory.data.fetch.socket.socket", Pipe)
    with pytest.raises(ConnectionError, match="refused.*tried once"):
        fetch("http://rebinds/a.png", cache=tmp_path, limits=replace(QUICK, waits=()))
    assert asked == ["rebinds"] and reached == [("1.1.1.1", 80)]


def test_the_host_that_is_named_is_the_host_that_is_asked_for(monkeypatch, web, get):
    names(monkeypatch, **{"pictures.example": ["127.0.0.1"], "xn--bcher-kva.example": ["127.0.0.1"]})
    web.pages["/a%20b%C3%A9.png?x=%20y"] = b"here"
    assert get(web.url("/a b\u00e9.png?x= y#part", host="PICTURES.example")) == b"here"
    assert get(web.url("/a%20b%C3%A9.png?x=%20y", host="b\u00fccher.example")) == b"here"
    assert [host.split(":")[0] for _, host in web.asked] == ["pictures.example", "xn--bcher-kva.example"]


def test_over_tls_the_name_is_checked_and_not_the_address(monkeypatch, web, get):
    names(monkeypatch, **{"pictures.example": ["127.0.0.1"]})
    seen = []

    class Plain:
        def wrap_socket(self, pipe, *, server_hostname):
            seen.append(server_hostname)
            return pipe

    assert module._tls().check_hostname and module._tls().verify_mode == ssl.CERT_REQUIRED
    monkeypatch.setattr("accessory.data.fetch._tls", Plain)
    web.pages["/a.png"] = b"here"
    assert get(web.url(host="pictures.example").replace("http:", "https:")) == b"here"
    assert seen == ["pictures.example"] and web.asked[0][1] == f"pictures.example:{web.port}"


def test_a_server_without_tls_on_an_https_url_is_an_error_in_words(web, get):
    with pytest.raises(ConnectionError, match="cannot be read .*tried once"):
        get(web.url().replace("http:", "https:"), limits={"waits": ()})


# ---- redirects


def test_redirects_are_followed_a_few_times(web, get):
    web.pages |= {"/1": "/2", "/2": web.url("/3"), "/3": "4", "/4": b"there"}
    assert get(web.url("/1")) == b"there"
    web.pages |= {"/loop": "/loop"}
    with pytest.raises(ValueError, match="redirects more than 4 times"):
        get(web.url("/loop"))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("http://127.0.0.1/secret", "not public"),
        ("http://169.254.169.254/latest/meta-data", "not public"),
        ("http://[::1]/", "not public"),
        ("file:///etc/passwd", "got the scheme 'file'"),
        ("http://user@1.1.1.1/", "holds a user name"),
        ("//localhost/x", "not public"),
    ],
)
def test_a_redirect_is_checked_as_the_first_url_is(monkeypatch, web, tmp_path, target, said):
    names(monkeypatch, outside=["127.0.0.1"])
    real = resolve

    def lenient(place, **more):
        return real(place, allow_private=place.host == "outside" or more["allow_private"])

    monkeypatch.setattr("accessory.data.fetch.resolve", lenient)
    web.pages["/"] = target
    with pytest.raises(ValueError, match=f"outside.*: redirects to .*{said}"):
        fetch(web.url("/", host="outside"), cache=tmp_path, limits=QUICK)


# ---- limits and tries


def test_a_body_that_is_too_large_is_refused_by_its_length_and_while_it_streams(web, get):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while not web.over.is_set():
            handler.wfile.write(b"x" * 65536)

    def chunks(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while not web.over.is_set():
            handler.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")

    web.pages |= {"/told": b"x" * 1001, "/endless": endless, "/chunks": chunks, "/fits": b"x" * 1000}
    assert len(get(web.url("/fits"), limits={"size": 1000})) == 1000
    for path in ("/told", "/endless", "/chunks"):
        with pytest.raises(ValueError, match="has more than 1000 bytes"):
            get(web.url(path), limits={"size": 1000})


@pytest.mark.parametrize("way", ["no answer", "half a header", "drops of a body"])
def test_a_slow_host_is_given_up(web, get, way):
    def slow(handler):
        if way == "half a header":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-")
        if way == "drops of a body":
            handler.send_response(200)
            handler.end_headers()
            while not web.over.wait(0.01):
                handler.wfile.write(b"x")
        web.over.wait(5)

    web.pages["/a.png"] = slow
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="gave no full answer in time, tried 2 times"):
        get(web.url(), limits={"read": 0.05, "total": 0.1, "waits": (0.0,)})
    assert time.monotonic() - began < 3 and len(web.asked) == 2


def test_what_may_pass_is_tried_again_and_what_will_not_is_not(web, get):
    answers = [503, 429, b"at last"]

    def moody(handler):
        now = answers.pop(0)
        handler.send_response(now if isinstance(now, int) else 200)
        handler.end_headers()
        handler.wfile.write(now if isinstance(now, bytes) else b"")

    web.pages |= {"/moody": moody, "/gone": 410, "/busy": 500}
    assert get(web.url("/moody")) == b"at last"
    with pytest.raises(ValueError, match="answers 410 Gone, expected 200; check the URL"):
        get(web.url("/gone"))
    with pytest.raises(ConnectionError, match="answers 500 .*tried 3 times; check the URL and the network"):
        get(web.url("/busy"))
    assert [path for path, _ in web.asked] == ["/moody"] * 3 + ["/gone"] + ["/busy"] * 3


def test_a_body_that_breaks_off_is_tried_again(web, get):
    def short(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "10")
        handler.end_headers()
        handler.wfile.write(b"whole body" if len(web.asked) == 2 else b"half")

    def broken(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nxxxxx\r\n")

    web.pages |= {"/short": short, "/broken": broken, "/nonsense": lambda handler: handler.wfile.write(b"220 mail\r\n")}
    assert get(web.url("/short")) == b"whole body"
    for path in ("/broken", "/nonsense"):
        with pytest.raises(ConnectionError, match=f"{path}: .*, tried 3 times"):
            get(web.url(path))


def test_a_host_that_is_not_there_is_one_sentence(get, monkeypatch):
    with socket.socket() as bound:  # and nobody listens there
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError, match="cannot be read .*refused"):
            get(f"http://127.0.0.1:{bound.getsockname()[1]}/a.png?key=secret")
    for code, said in [(socket.EAI_NONAME, "not found .*; check"), (socket.EAI_AGAIN, "not found .*tried 3 times")]:

        def unknown(*_, code=code, **__):
            raise socket.gaierror(code, "Name or service not known")

        monkeypatch.setattr("accessory.data.address.socket.getaddrinfo", unknown)
        with pytest.raises(ConnectionError, match=f"the host nowhere.example is {said}") as caught:
            get("http://nowhere.example/a.png?key=secret")
        assert "secret" not in str(caught.value)


# ---- the cache


def test_what_was_fetched_is_kept_and_a_damaged_entry_is_fetched_again(web, get, tmp_path):
    web.pages["/a.png"] = b"picture"
    assert get(web.url()) == get(web.url()) == b"picture" and len(web.asked) == 1
    (entry,) = [path for path in (tmp_path / "cache").glob("??/*")]
    entry.write_bytes(entry.read_bytes()[:-1])
    assert get(web.url()) == b"picture" and len(web.asked) == 2
    assert hashlib.sha256(b"picture").digest() == entry.read_bytes()[:32]
    assert [path for path in entry.parent.iterdir()] == [entry]


def test_what_was_fetched_from_inside_is_not_given_to_who_may_not_fetch_it(web, get, tmp_path):
    web.pages["/a.png"] = b"picture"
    assert get(web.url()) == b"picture"
    with pytest.raises(ValueError, match="not public"):
        get(web.url(), allow_private=False)


def test_without_room_for_a_cache_the_picture_comes_nevertheless(web, get, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    web.pages["/a.png"] = b"picture"
    assert get(web.url(), cache=tmp_path / "file") == b"picture"
    assert "is not kept" in caplog.text


def test_a_sweep_removes_what_is_old_and_what_was_not_used_for_longest(web, get, tmp_path):
    for number in range(4):
        web.pages[f"/{number}"] = bytes(100)
        get(web.url(f"/{number}"))
    paths = [path for path in (tmp_path / "cache").glob("??/*")]
    for path, age in zip(sorted(paths), (5000, 400, 300, 0), strict=True):
        os.utime(path, (time.time() - age,) * 2)
    assert sweep(tmp_path / "cache", Limits(age=1000.0)) == 1
    assert sweep(tmp_path / "cache", Limits(kept=2 * 132)) == 1
    left = list((tmp_path / "cache").glob("??/*"))
    assert sorted(left) == sorted(paths)[2:]


def test_names_of_urls_in_sentences_are_short_and_keep_secrets():
    assert shown("http://u:p@host/a.png?token=1#x") == "http://host/a.png?..."
    assert len(shown("http://host/" + "a" * 500)) == 100 and take_apart("HTTP://Host./").url == "http://host/"


# ---- as pictures


def test_a_picture_comes_from_a_url_that_is_allowed(web, tmp_path, monkeypatch):
    monkeypatch.setattr("accessory.data.fetch.LIMITS", QUICK)
    web.pages |= {"/a.png": png((5, 4)), "/page": b"<!DOCTYPE html><html>not found</html>", "/big": png((300, 300))}
    more = {"allow_private_urls": True, "cache": tmp_path}
    assert load_picture(web.url(), **more).size == (5, 4)
    with pytest.raises(ValueError, match=r"^picture http://127\.0\.0\.1.*which is not public"):
        load_picture(web.url(), cache=tmp_path)
    with pytest.raises(ValueError, match="picture http.*/page: got a web page"):
        load_picture(web.url("/page"), **more)
    with pytest.raises(ValueError, match="picture http.*/big: got 300 x 300 pixels, expected 1 to 80000"):
        load_picture(web.url("/big"), max_pixels=80_000, **more)
    web.pages["/other"] = png()
    with pytest.raises(ValueError, match="has more than 50 bytes"):
        load_picture(web.url("/other"), max_bytes=50, **more)
    with pytest.raises(ValueError, match="picture http.*answers 404"):
        load_picture(web.url("/none.png?key=secret"), **more)
