"""Images: where a row's pictures are found, and decoding them without a surprise."""

import base64
import binascii
import contextlib
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from PIL import ExifTags, Image, ImageOps
from rapidfuzz import fuzz, process

from finetune.data.downloads import download
from finetune.data.patience import DriveError, read_patiently
from finetune.data.pdf import render_page
from finetune.data.pillow import own_pillow_settings, to_rgb, to_rgb_or_grey
from finetune.data.signatures import image_format, why_no_image
from finetune.data.truncation import CutShortError, largest_part, refuse_cut_short
from finetune.errors import DataError

MAX_FILE_MIB = 512

# What stands for an image that has no name of its own.
BYTES, DATA_URI, BASE64 = "(bytes in the row)", "(data URI)", "(base64 in the row)"


@dataclass(frozen=True, slots=True)
class ImageAccess:
    """Where a source's images are looked up, and what they may be.

    `url_cache` None: downloads are not kept. `folders` names those that the rows come from where
    these are several and none is said to be the root: relative paths are then refused.
    """

    root: Path
    allow_outside_root: bool = False
    max_megapixels: float = 100
    allow_urls: bool = False
    url_max_mib: float = 20
    url_timeout_seconds: float = 10
    url_cache: Path | None = None
    pdf_dpi: int = 144
    folders: str = ""
    read_timeout_seconds: float | None = None
    read_retries: int = 3


def load_image(source: str | bytes, access: ImageAccess) -> Image.Image:
    """Decode an image to upright RGB: a path (relative ones from the root), a data URI, base64, a
    URL, or the bytes of a file; `FILE.pdf#page=N` is a page of a PDF.

    Of an animation the first frame, of a TIFF the first page. Raises `DataError` saying what is
    wrong with it: missing, outside the root, cut short, no image, too large, a URL; `DriveError`
    where a drive does not give it.
    """
    page = page_of(source)
    name, data = read_image_file(source, access)
    return decode_image(name, data, access, page=page)


def read_image_file(source: str | bytes, access: ImageAccess) -> tuple[str, bytes]:
    """A name for messages, and the file's bytes as they are stored; of a PDF, the whole of it.

    Raises `DataError` where they cannot be had, `DriveError` where that is the drive's fault.
    """
    if isinstance(source, bytes):
        return BYTES, source
    if source[:5].lower() == "data:":
        return DATA_URI, _decode_data_uri(source)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if scheme is not None:
        return quoted_name(source), _read_url(source, scheme[1].lower(), access)
    if _is_base64_of_an_image(source):
        return BASE64, _decode_base64(source, "base64 in the row")
    path = source if page_of(source) is None else source.rpartition("#")[0]
    return quoted_name(source), _read_path(path, access)


def page_of(source: str | bytes) -> int | None:
    """The page, from 1, that `FILE.pdf#page=N` names; None where none is named.

    Raises `DataError` for another fragment, which would else be part of a file's name.
    """
    if isinstance(source, bytes) or source[:5].lower() == "data:":
        return None
    path, _, fragment = source.rpartition("#")
    if not path.lower().endswith(".pdf"):
        return None
    if not re.fullmatch(r"page=[1-9]\d{0,6}", fragment, re.ASCII):
        raise DataError(
            f"image {quoted_name(source)} names no page by '#{fragment[:20]}'; "
            "write FILE.pdf#page=1"
        )
    return int(fragment.removeprefix("page="))


def decode_image(
    name: str,
    data: bytes,
    access: ImageAccess,
    *,
    page: int | None = None,
    reduction: int = 1,
    keep_grey: bool = False,
) -> Image.Image:
    """The file's bytes as upright RGB; `name` stands in messages. Raises `DataError`.

    A `reduction` of 2, 4 or 8 decodes a JPEG file at that part of its edges, rounded up; other
    formats have their own size all the same. With `keep_grey`, what has no colours is mode L.
    """
    found = image_format(data)
    try:
        if found is None:
            raise DataError(why_no_image(data))
        if found == "PDF":
            return render_page(data, page, dpi=access.pdf_dpi, max_megapixels=access.max_megapixels)
        if page is not None:
            raise DataError(f"is {found}, not a PDF, and has no pages; leave #page={page} out")
        image = _decode(data, found, access.max_megapixels, reduction if found == "JPEG" else 1)
        return image if keep_grey else to_rgb(image)
    except CutShortError as error:
        raise DataError(f"image {name} is cut short ({error}); mend or replace it") from error
    except DataError as error:
        raise DataError(f"image {name} {error}") from error


def jpeg_size(name: str, data: bytes, access: ImageAccess) -> tuple[int, int] | None:
    """Width and height that `decode_image` would give, from a JPEG file's header alone; None for
    other formats. Raises `DataError`.
    """
    if image_format(data) != "JPEG":
        return None
    try:
        with _opened(data, "JPEG", access.max_megapixels) as image:
            sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return (image.height, image.width) if sideways else image.size
    except DataError as error:
        raise DataError(f"image {name} {error}") from error


def _decode(data: bytes, found: str, max_megapixels: float, reduction: int) -> Image.Image:
    """Upright, RGB or L."""
    if found in ("AVIF", "HEIF"):
        Image.init()
        if found not in Image.OPEN:
            raise DataError(f"is {found}, which this Pillow cannot read; convert it to PNG or JPEG")
    _refuse_too_large(largest_part(data, found), max_megapixels)
    refuse_cut_short(data, found)
    with _opened(data, found, max_megapixels) as image:
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb_or_grey(image)


@contextlib.contextmanager
def _opened(data: bytes, found: str, max_megapixels: float) -> Iterator[Image.Image]:
    """The file's header read; whatever goes wrong within is a `DataError`."""
    with own_pillow_settings():
        try:
            with Image.open(io.BytesIO(data), formats=(found,)) as image:
                _refuse_too_large(image.size, max_megapixels)
                yield image
        except DataError:
            raise
        except Exception as error:  # decoders let through whatever foreign bytes lead them to
            raise DataError(_fault(error, data)) from error


def _refuse_too_large(size: tuple[int, int], max_megapixels: float) -> None:
    width, height = size
    if width * height > max_megapixels * 1e6:
        raise DataError(
            f"is too large ({width:,} x {height:,} pixels, more than {max_megapixels:g} "
            "megapixels); scale it down, or raise data.max_megapixels"
        )


def _read_url(url: str, scheme: str, access: ImageAccess) -> bytes:
    shown = quoted_name(url)
    if scheme == "file":
        raise DataError(f"image {shown} is a file:// URL; give the path alone")
    if scheme not in ("http", "https"):
        raise DataError(f"image {shown} is a {scheme}:// URL, which is not read; save it as a file")
    if not access.allow_urls:
        raise DataError(
            f"image {shown} is a URL, and nothing is downloaded; save it as a file, or set "
            "data.allow_urls: true"
        )
    try:
        return download(
            url,
            max_mib=access.url_max_mib,
            timeout_seconds=access.url_timeout_seconds,
            cache_folder=access.url_cache,
        )
    except DataError as error:
        raise DataError(f"image {shown} {error}") from error


def _read_path(source: str, access: ImageAccess) -> bytes:
    name = quoted_name(source)
    if access.folders and not Path(source).is_absolute():
        raise DataError(
            f"rows come from several folders ({access.folders}), so that it is not clear where "
            f"{name} starts; set image_root"
        )
    try:
        return read_patiently(
            partial(_read_inside_root, source, access),
            timeout_seconds=access.read_timeout_seconds,
            retries=access.read_retries,
        )
    except DriveError as error:  # before OSError, of which it is one
        raise DriveError(f"image {name} {error}") from error
    except DataError as error:  # before ValueError
        raise DataError(f"image {name} {error}") from None
    except FileNotFoundError:
        raise DataError(
            f"image {name} not found in {access.root}; {_where_else(source, access.root)}"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"image {name} cannot be read ({reason}); mend or replace it") from error


def _read_inside_root(source: str, access: ImageAccess) -> bytes:
    # Links are followed here and nowhere else: what is checked is what is opened
    path = Path(os.path.realpath(access.root / source))
    if not access.allow_outside_root and not path.is_relative_to(os.path.realpath(access.root)):
        raise DataError(
            f"lies outside image_root ({access.root}); move it there, set image_root, or set "
            "data.allow_outside_root: true"
        )
    return _read_regular(path)


def _read_regular(path: Path) -> bytes:
    """A file's bytes; `DataError` for what is no file (a pipe would wait for ever) or far too
    large.
    """
    kind = path.stat().st_mode  # first, since to open a device may already do something
    if not stat.S_ISREG(kind):
        found = "a folder" if stat.S_ISDIR(kind) else "a device, pipe or socket"
        raise DataError(f"is {found}, not a file; mend the path")
    # not blocking, in case it has become a pipe since
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(path, flags | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > MAX_FILE_MIB * 2**20:
            raise DataError(
                f"is too large a file ({num_bytes / 2**20:,.0f} MiB, at most {MAX_FILE_MIB}); "
                "give an image file"
            )
        return file.read()


def _where_else(source: str, root: Path) -> str:
    """What to do about a missing file: the place where it is after all, or a name much like it."""
    if source.startswith("~"):
        return "~ is not expanded, write the whole path"
    if not root.is_dir():
        return "that folder is not there; set image_root"
    if (root / source).is_symlink():
        return "it is a link to what is not there; mend the link"
    forward = source.replace("\\", "/")
    if forward != source and (root / forward).is_file():
        return "write / for \\ in the path"
    if not Path(source).is_absolute() and ".." not in Path(source).parts:
        folders = [root.resolve().parent, *(root / name for name in _names(root, folders=True))]
        for folder in folders:
            if (folder / source).is_file():
                return f"it is in {folder}: set image_root to that"
        parts = Path(source).parts
        for k in range(1, len(parts)):
            if root.joinpath(*parts[k:]).is_file():
                return f"{'/'.join(parts[k:])!r} is there: mend the path, or set image_root"
    path = root / source
    near = _nearest(path.name, _names(path.parent))
    hint = f"did you mean {near!r}? " if near else ""
    return f"{hint}mend the path, or set image_root"


def _names(folder: Path, *, folders: bool = False) -> tuple[str, ...]:
    try:
        return _listed(folder, folder.stat().st_mtime_ns, folders)
    except OSError:
        return ()


@lru_cache(maxsize=16)
def _listed(folder: Path, _changed_ns: int, folders: bool) -> tuple[str, ...]:
    """Names of a folder's files, or of its folders; so many at most that a wrong root, where every
    row asks, stays fast.
    """
    limit = 50 if folders else 5000
    names = []
    with os.scandir(folder) as entries:
        for _, entry in zip(range(20 * limit), entries, strict=False):
            if entry.is_dir() == folders:
                names.append(entry.name)
            if len(names) == limit:
                break
    return tuple(sorted(names))


def _nearest(name: str, names: tuple[str, ...]) -> str | None:
    """The name most like this one. Numbers must agree: '0040.png' is never meant by '0041.png'."""

    def numbers(text: str) -> list[int]:
        return [int(digits) for digits in re.findall(r"[0-9]{1,18}", text)]

    wanted = numbers(Path(name).stem)
    same = [other for other in names if numbers(Path(other).stem) == wanted]
    found = process.extractOne(
        name, same, scorer=fuzz.ratio, processor=str.casefold, score_cutoff=75
    )
    return found[0] if found else None


def name_of(source: str | bytes) -> str:
    """What pages call an image: a path or URL, and of a URL not what lets somebody in, since pages
    and messages are kept, and handed on.
    """
    if isinstance(source, bytes):
        return BYTES
    if source[:5].lower() == "data:":
        return DATA_URI
    return BASE64 if _is_base64_of_an_image(source) else without_secrets(source)


def quoted_name(source: str | bytes) -> str:
    """As `name_of`, for messages: in quotes, and cut where it is long."""
    name = name_of(source)
    if name in (BYTES, DATA_URI, BASE64):
        return name
    return repr(name) if len(name) <= 120 else f"{name[:80]!r}..."


def without_secrets(source: str) -> str:
    """A URL without name and password, and without its query, where signed ones have theirs."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source)
    if scheme is None:
        return source
    place, mark, _ = source[scheme.end() :].partition("?")
    authority, slash, path = place.partition("/")
    _, at, host = authority.rpartition("@")
    return f"{scheme[0]}{at and '...@'}{host}{slash}{path}{mark and '?...'}"


def _decode_data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or header.rsplit(";", 1)[-1].strip().lower() != "base64":
        raise DataError("image (data URI) must read data:image/...;base64,...; encode it as base64")
    if "%" in payload:
        raise DataError(
            "image (data URI) is percent-encoded (it holds '%'); write its base64 as it is"
        )
    return _decode_base64(payload, "data URI")


def _is_base64_of_an_image(source: str) -> bool:
    """Whether a string is a file's content rather than its path: JPEG begins with '/9j/'."""
    if len(source) < 40 or not re.fullmatch(r"[A-Za-z0-9+/]{40}", source[:40]):
        return False
    return image_format(base64.b64decode(source[:40])) is not None


def _decode_base64(text: str, place: str) -> bytes:
    try:
        # line breaks are usual in base64, and nothing else is let through
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        reason = str(error) if isinstance(error, binascii.Error) else "other letters"
        raise DataError(
            f"image ({place}) is not valid base64 ({reason}); encode it again"
        ) from error


def _fault(error: Exception, data: bytes) -> str:
    """What is wrong with the file, from Pillow's error."""
    text = str(error)
    if (
        "truncated" in text.lower()
        or "not enough image data" in text
        or isinstance(error, EOFError)
    ):
        return f"is cut short (only {len(data):,} bytes); mend or replace it"
    if "cannot identify" in text:
        return "is damaged at its beginning; mend or replace it"
    return f"cannot be decoded ({text or type(error).__name__}); mend or replace it"
