import http.server
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from finetune.data import downloads
from finetune.data.downloads import download
from finetune.data.images import ImageAccess, load_image
from finetune.errors import DataError


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Site:
    """A web server on loopback; `pages` maps a path to what answers its requests."""

    def __init__(self) -> None:
        self.pages: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append((self.path, dict(self.headers)))
                try:
                    site.pages.get(self.path, gives(b"gone", status=404))(self)
                except OSError:  # the client has hung up
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def gives(body: bytes, *, status: int = 200, **headers: str) -> Callable:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def leads_to(target: str) -> Callable:
    return gives(b"", status=302, Location=target)


def sends(first: bytes, piece: bytes) -> Callable:
    """More and more, 200 pieces of it."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.wfile.write(first)
        for _ in range(200):
            request.wfile.write(piece)

    return answer


@dataclass
class Endless:
    """A page that goes on until the client hangs up or the test ends: a little at a time, so that
    no single read takes long, or nothing.
    """

    first: bytes = b""
    piece: bytes = b""
    is_over: threading.Event = field(default_factory=threading.Event)
    has_ended: bool = False
    """Of itself, long after any limit."""

    def __call__(self, request: http.server.BaseHTTPRequestHandler) -> None:
        request.wfile.write(self.first)
        until = time.monotonic() + 60
        while not self.is_over.wait(0.05 if self.piece else 60) and time.monotonic() < until:
            request.wfile.write(self.piece)
        self.has_ended = not self.is_over.is_set()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    site.server.shutdown()
    site.server.server_close()
    thread.join()


@pytest.fixture
def _loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_is_allowed", lambda address: address == "127.0.0.1")


def fetched(
    url: str, *, max_mib: float = 1, seconds: float = 60, cache: Path | None = None
) -> bytes:
    """By default, with a limit that nothing here comes near."""
    return download(url, max_mib=max_mib, timeout_seconds=seconds, cache_folder=cache)


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # cloud machines hand out credentials there
        ("100.64.0.1", False),
        ("192.0.2.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::7f00:1", False),  # 127.0.0.1 behind a translator
        ("64:ff9b::5db8:d70e", True),
        ("2002:7f00:1::", False),
    ],
)
def test_only_public_addresses_are_connected_to(address: str, is_public: bool) -> None:
    assert downloads._is_allowed(address) is is_public


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "127.1", "0x7f000001"])
def test_the_machine_itself_is_refused_however_it_is_written(site: Site, host: str) -> None:
    site.pages["/a.png"] = gives(png())
    with pytest.raises(DataError, match=r"not a public address; save it as a file|is not found"):
        fetched(f"http://{host}:{site.server.server_port}/a.png")
    assert not site.asked


def test_a_host_is_refused_if_any_of_its_addresses_is_private(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [(2, 1, 6, "", ("93.184.215.14", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: answers)
    with pytest.raises(DataError, match=r"leads to pictures\.example \(10\.0\.0\.1\), which is no"):
        fetched("http://pictures.example/a.png")


@pytest.mark.usefixtures("_loopback_is_public")
def test_the_connection_goes_to_the_address_that_was_checked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that changes its mind between the check and the connection changes nothing."""
    site.pages["/a.png"] = gives(png())
    real, asked = socket.getaddrinfo, []

    def rebinding(host: str, *args: object, **options: object) -> object:
        asked.append(host)
        if host == "pictures.example":
            assert asked.count(host) == 1
            host = "127.0.0.1"
        return real(host, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    port = site.server.server_port
    assert fetched(f"http://pictures.example:{port}/a.png") == png()
    ((_, headers),) = site.asked
    assert headers["Host"] == f"pictures.example:{port}"


@pytest.mark.usefixtures("_loopback_is_public")
def test_a_request_names_the_program_and_carries_nothing_else(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    site.pages["/a%20b.png?x=%C3%A9&y=1"] = leads_to("/c.png")
    site.pages["/c.png"] = gives(png(), Set_Cookie="a=1")
    assert fetched(f"{site.url}/a%20b.png?x=é&y=1#part") == png()
    for _, headers in site.asked:
        assert headers["User-Agent"].startswith("vlm-recipes/")
        assert set(headers) == {"Host", "Accept-Encoding", "User-Agent", "Accept", "Connection"}


@pytest.mark.usefixtures("_loopback_is_public")
def test_redirects_are_followed_three_times_and_each_is_checked(site: Site) -> None:
    for n in range(1, 6):
        site.pages[f"/{n}"] = leads_to(f"/{n - 1}")
    site.pages["/0"] = gives(png())
    assert fetched(f"{site.url}/3") == png()
    with pytest.raises(DataError, match="redirected more than 3 times"):
        fetched(f"{site.url}/4")
    site.pages |= {
        "/private": leads_to("http://10.0.0.1/a.png"),
        "/metadata": leads_to("//169.254.169.254/latest/"),
        "/file": leads_to("file:///etc/passwd"),
        "/user": leads_to("http://me:secret@example.com/"),
        "/nowhere": gives(b"", status=301),
    }
    for path, message in {
        "/private": r"leads to 10\.0\.0\.1.*not a public address",
        "/metadata": r"leads to 169\.254\.169\.254.*not a public address",
        "/file": "leads to a file:// URL; only http and https are followed",
        "/user": "with a user name or password",
        "/nowhere": "is redirected to nowhere",
    }.items():
        with pytest.raises(DataError, match=message):
            fetched(site.url + path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@example.com/a.png", "with a user name or password"),
        ("http://@example.com/a.png", "with a user name or password"),
        ("http:///a.png", "without a host"),
        ("http://example.com:x/a.png", "not a URL that can be read"),
        ("http://[::1/a.png", "not a URL that can be read"),
        ("http://" + "a" * 70 + ".com/a.png", "not a URL that can be read"),
        ("http://example.com/a b.png", "with a space or control character"),
        ("http://example.com/a\r\nHost: x", "with a space or control character"),
    ],
)
def test_a_url_that_cannot_be_asked_for_says_why(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetched(url)


@pytest.mark.usefixtures("_loopback_is_public")
@pytest.mark.parametrize(
    ("page", "message"),
    [
        (gives(b"", status=404), r"is not there \(404 Not Found\); mend the URL"),
        (gives(b"", status=410), "is not there"),
        (gives(b"", status=403), r"is not public \(403 Forbidden\); save it as a file"),
        (gives(b"", status=503), "was not given by its server.*try again later"),
        (gives(b"", status=429), "try again later"),
        (gives(png(), status=206), "was not given by its server .206"),
        (gives(b"<!doctype html><p>Log in"), "is a web page"),
        (gives(b'{"error": "quota"}'), "is JSON"),
        (gives(b""), "is an empty file"),
        (gives(png(), Content_Length="999"), r"broke off after \d+ of 999 bytes.*try again"),
        (gives(bytes(2**20 + 1)), r"is larger than 1 MiB; raise data\.url_max_mib"),
        (sends(b"HTTP/1.0 200 OK\r\n\r\n", bytes(2**16)), "is larger than 1 MiB"),
        (sends(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", bytes(2**16)), "zero bytes"),
        (sends(b"", b"nonsense\r\n"), "cannot be downloaded .nonsense"),
        (sends(b"HTTP/1.0 200 OK\r\n", b"A: b\r\n"), "cannot be downloaded .*headers"),
        (lambda request: request.connection.shutdown(socket.SHUT_RDWR), "cannot be downloaded"),
    ],
)
def test_an_answer_that_is_no_image_says_why(
    site: Site, tmp_path: Path, page: Callable, message: str
) -> None:
    site.pages["/a.png"] = page
    with pytest.raises(DataError, match=message):
        fetched(f"{site.url}/a.png", cache=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("_loopback_is_public")
@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"", b""),
        (b"", b"H"),
        (b"HTTP/1.0 200 OK\r\nA: ", b"b"),
        (b"HTTP/1.0 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x"),
    ],
    ids=["silent", "status", "headers", "body", "announced body"],
)
def test_the_time_limit_is_for_the_whole_download(site: Site, first: bytes, piece: bytes) -> None:
    page = site.pages["/a.png"] = Endless(first, piece)
    try:
        with pytest.raises(DataError, match=r"took longer than 0\.4 s.*data\.url_timeout_seconds"):
            fetched(f"{site.url}/a.png", seconds=0.4)
        assert not page.has_ended
    finally:
        page.is_over.set()


def test_a_name_server_that_does_not_answer_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_over, answered = threading.Event(), []

    def silent(*_args: object, **_options: object) -> list[object]:
        answered.append(not is_over.wait(60))
        return []

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    with pytest.raises(DataError, match=r"took longer than 0\.2 s"):
        fetched("http://pictures.example/a.png", seconds=0.2)
    assert not answered
    is_over.set()


def test_an_unknown_host_and_a_closed_port_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_args: object, **_options: object) -> list[object]:
        raise socket.gaierror("Name or service not known")  # a real name server may take its time

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", unknown)
        with pytest.raises(DataError, match=r"the host nowhere\.invalid is not found"):
            fetched("http://nowhere.invalid/a.png")
    monkeypatch.setattr(downloads, "_is_allowed", lambda _address: True)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match=r"cannot be downloaded \(Connection refused\)"):
            fetched(f"http://127.0.0.1:{taken.getsockname()[1]}/a.png")


@pytest.mark.usefixtures("_loopback_is_public")
def test_a_server_without_a_valid_certificate_is_refused(site: Site) -> None:
    port = site.server.server_port  # speaks no TLS at all
    with pytest.raises(DataError, match=r"cannot be downloaded \(.*SSL"):
        fetched(f"https://127.0.0.1:{port}/a.png")


@pytest.mark.usefixtures("_loopback_is_public")
def test_tls_asks_for_the_host_by_its_name(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Context:
        def wrap_socket(self, stream: socket.socket, *, server_hostname: str) -> socket.socket:
            asked.append(server_hostname)
            return stream

    monkeypatch.setattr(downloads, "_tls", Context)
    site.pages["/a.png"] = gives(png())
    assert fetched(f"https://localhost:{site.server.server_port}/a.png") == png()
    assert asked == ["localhost"]


@pytest.mark.usefixtures("_loopback_is_public")
def test_what_was_downloaded_once_is_read_from_the_cache(site: Site, tmp_path: Path) -> None:
    site.pages["/a.png"] = gives(png())
    cache = tmp_path / "cache"
    url = f"{site.url}/a.png"
    with ThreadPoolExecutor(4) as threads:  # nobody reads half a file
        assert set(threads.map(lambda _: fetched(url, cache=cache), range(8))) == {png()}
    num_asked = len(site.asked)
    site.server.shutdown()
    site.server.server_close()
    assert fetched(url + "#page=1", cache=cache) == png()
    assert len(site.asked) == num_asked
    (kept,) = [path for path in cache.rglob("*") if path.is_file()]
    assert len(kept.name) == 64


@pytest.mark.usefixtures("_loopback_is_public")
def test_a_cache_that_cannot_be_written_is_named(site: Site, tmp_path: Path) -> None:
    site.pages["/a.png"] = gives(png())
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"(kept in|read from) .*mend data\.url_cache"):
        fetched(f"{site.url}/a.png", cache=tmp_path / "cache")


@pytest.mark.usefixtures("_loopback_is_public")
def test_an_image_is_loaded_by_its_url_where_that_is_allowed(site: Site, tmp_path: Path) -> None:
    site.pages["/a.png"] = gives(png())
    access = ImageAccess(tmp_path, allow_urls=True, url_cache=tmp_path / "cache")
    assert load_image(f"{site.url}/a.png", access).size == (30, 20)
    site.pages["/a.pdf"] = leads_to("/a.png")
    with pytest.raises(DataError, match=r"a\.pdf#page=2' is PNG, not a PDF"):
        load_image(f"{site.url}/a.pdf#page=2", access)
    with pytest.raises(DataError, match=r"image 'http://127\.0\.0\.1:\d+/b\.png' is not there"):
        load_image(f"{site.url}/b.png", access)
    with pytest.raises(DataError, match="is a URL, and nothing is downloaded"):
        load_image(f"{site.url}/a.png", ImageAccess(tmp_path, url_cache=tmp_path / "cache"))
