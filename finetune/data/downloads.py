"""Images by URL: only public addresses, only so many bytes, only so long, and kept for next time.

A data set is written by others, and so are its URLs: one may point at a machine that only this one
can reach. Hence the name is resolved first, every address must be public, and the connection goes
to the very address that was checked, at each redirect anew. Proxies and credentials of the
environment are not used, and no cookie is kept.
"""

import contextlib
import hashlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import SplitResult, quote, urldefrag, urljoin, urlsplit

from finetune import __version__
from finetune.data.signatures import image_format, why_no_image
from finetune.errors import DataError

MAX_REDIRECTS = 3
_CHUNK_BYTES = 1 << 16
_USER_AGENT = f"vlm-recipes/{__version__} (dataset images)"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def download(
    url: str, *, max_mib: float, timeout_seconds: float, cache_folder: Path | None = None
) -> bytes:
    """The bytes of the image or PDF at an http(s) URL, from the cache where it is there already.

    `timeout_seconds` is for the whole download, redirects included. Raises `DataError` with a
    clause that follows the URL's name: refused, gone, too large, too slow, no image.
    """
    url = urldefrag(url).url
    kept = cache_folder / _cache_name(url) if cache_folder else None
    if kept is not None:
        with contextlib.suppress(FileNotFoundError):
            return _read_kept(kept)
    data = _fetch(url, int(max_mib * 2**20), timeout_seconds)
    if image_format(data) is None:  # never kept: a server's web page would stay for good
        raise DataError(why_no_image(data))
    if kept is not None:
        _keep(kept, data)
    return data


def _cache_name(url: str) -> str:
    digest = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{digest[:2]}/{digest}"


def _read_kept(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(
            f"cannot be read from the cache ({path}: {error.strerror}); mend data.url_cache"
        ) from error


def _keep(path: Path, data: bytes) -> None:
    """Written aside and renamed, so that another process never reads half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(aside).replace(path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(
            f"cannot be kept in {path.parent} ({error.strerror}); mend data.url_cache"
        ) from error


def _fetch(url: str, max_bytes: int, timeout_seconds: float) -> bytes:
    deadline = time.monotonic() + timeout_seconds
    try:
        for _ in range(MAX_REDIRECTS + 1):
            with _get(url, deadline) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    return _read_body(response, max_bytes)
                target = response.headers.get("Location")
            if not target:
                raise DataError("is redirected to nowhere; mend the URL")
            url = urldefrag(urljoin(url, target)).url
        raise DataError(f"is redirected more than {MAX_REDIRECTS} times; give the last URL itself")
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        # at the deadline the connection is shut down, which looks like any other failure
        if time.monotonic() >= deadline or isinstance(error, TimeoutError):
            raise DataError(
                f"took longer than {timeout_seconds:g} s; try again, raise "
                "data.url_timeout_seconds, or save it as a file"
            ) from error
        raise DataError(
            f"cannot be downloaded ({_words(error)}); try again, or mend the URL"
        ) from error


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:120] or type(error).__name__


@contextlib.contextmanager
def _get(url: str, deadline: float) -> Iterator[http.client.HTTPResponse]:
    """The answer to one request, without following redirects; cut off at the deadline."""
    parts, host, port = _checked(url)
    addresses = _resolve(host, port, deadline)
    for address in addresses:
        if not _is_allowed(address):
            raise DataError(
                f"leads to {host} ({address}), which is not a public address; save it as a file"
            )
    stream = _connect(addresses, port, deadline)
    # A limit for each read would let a server that sends a byte a second go on for ever
    watched, is_late = stream.dup(), threading.Event()
    watch = threading.Timer(max(deadline - time.monotonic(), 0), _shut, [watched, is_late])
    watch.daemon = True
    watch.start()
    connection = http.client.HTTPConnection(host, port)
    try:
        if parts.scheme == "https":
            stream = _tls().wrap_socket(stream, server_hostname=host)
        connection.sock = stream  # already connected, to the address that was checked
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        connection.putrequest("GET", f"{path}?{query}" if query else path, skip_host=True)
        bracketed = f"[{host}]" if ":" in host else host
        connection.putheader("Host", f"{bracketed}:{parts.port}" if parts.port else bracketed)
        connection.putheader("User-Agent", _USER_AGENT)
        connection.putheader("Accept", "image/*, application/pdf")
        connection.putheader("Connection", "close")
        connection.endheaders()
        with connection.getresponse() as response:
            yield response
        if is_late.is_set():  # a body of unknown length just ended, as far as anyone could see
            raise TimeoutError
    finally:
        watch.cancel()
        connection.close()
        stream.close()
        watched.close()


@cache
def _tls() -> ssl.SSLContext:
    """Certificates are checked against the system's own, or SSL_CERT_FILE; read once."""
    return ssl.create_default_context()


def _shut(stream: socket.socket, is_late: threading.Event) -> None:
    is_late.set()
    with contextlib.suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)


def _checked(url: str) -> tuple[SplitResult, str, int]:
    """The URL's parts, its host in ASCII, and its port."""
    if re.search(r"[\x00-\x20\x7f]", url):
        raise DataError("is a URL with a space or control character; write %20 for a space")
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError as error:  # UnicodeError among them
        raise DataError(f"is not a URL that can be read ({error}); mend it") from error
    if parts.scheme not in ("http", "https"):
        raise DataError(
            f"leads to a {parts.scheme}:// URL; only http and https are followed; save it as a file"
        )
    if not host:
        raise DataError("is a URL without a host; mend it")
    if parts.username is not None or parts.password is not None:
        raise DataError("is a URL with a user name or password; save it as a file")
    return parts, host, port


def _resolve(host: str, port: int, deadline: float) -> list[str]:
    """Every address of the host, in the system's order; in a thread, since it knows no timeout."""
    found: list[str] = []
    errors: list[OSError] = []

    def ask() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(answer[4][0]) for answer in answers))
        except (OSError, UnicodeError) as error:
            errors.append(error if isinstance(error, OSError) else OSError(str(error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(max(deadline - time.monotonic(), 0))
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise OSError(f"the host {host} is not found") from errors[0]
    return found


def _is_allowed(address: str) -> bool:
    """Whether an address is public, also where IPv6 carries an IPv4 address within."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        embedded = [part for part in inner if part is not None]
        if embedded:
            return all(_is_allowed(str(part)) for part in embedded)
    return ip.is_global and not ip.is_multicast


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    failure: OSError = OSError("the host has no address")
    for address in addresses:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        try:
            return socket.create_connection((address, port), timeout=remaining)
        except OSError as error:
            failure = error
    raise failure


def _read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """The body, as far as it is allowed; its announced length is a hint only."""
    if response.status != 200:
        raise DataError(_why_refused(response))
    too_large = DataError(
        f"is larger than {max_bytes / 2**20:g} MiB; raise data.url_max_mib, or save it as a file"
    )
    announced = response.length
    if announced is not None and announced > max_bytes:
        raise too_large
    chunks, num_bytes = [], 0
    while chunk := response.read(_CHUNK_BYTES):
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise too_large
        chunks.append(chunk)
    if announced is not None and num_bytes < announced:
        raise ConnectionError(f"broke off after {num_bytes:,} of {announced:,} bytes")
    return b"".join(chunks)


def _why_refused(response: http.client.HTTPResponse) -> str:
    reason = " ".join(response.reason.split())[:40]
    answer = f"{response.status} {reason}".strip()
    if response.status in (404, 410):
        return f"is not there ({answer}); mend the URL, or leave the row out"
    if response.status in (401, 403, 407):
        return f"is not public ({answer}); save it as a file"
    if response.status == 429 or response.status >= 500:
        return f"was not given by its server ({answer}); try again later"
    return f"was not given by its server ({answer}); mend the URL, or save it as a file"
