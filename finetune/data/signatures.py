"""What a file is, by its first bytes: names lie, and what is no image gets its own words.

Sources: the formats' own specifications; https://en.wikipedia.org/wiki/List_of_file_signatures.
"""

import json
import re

# Formats that are decoded, by Pillow's names. A format Pillow opens and this list leaves out is
# refused: PostScript would start a program, and others hold data rather than pictures.
_IMAGE_SIGNATURES: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    # the two reserved words tell a bitmap from a text that begins with BM
    ("BMP", re.compile(rb"BM....\0\0\0\0", re.DOTALL)),
    ("TIFF", re.compile(rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]")),
    ("PPM", re.compile(rb"P(?:[1-6]|f)[\s#]")),
    ("AVIF", re.compile(rb"....ftypavi[fs]", re.DOTALL)),
    ("HEIF", re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)),
    ("ICO", re.compile(rb"\0\0\x01\0[^\0]")),
)
_PDF = re.compile(rb"%PDF-")

# What is often found where an image was meant, and what to do about it. Where something repeats,
# bytes match in one way only (*+, (?>...)): with several, each comment more would double the time.
_REFUSED_SIGNATURES: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        re.compile(rb"version https://git-lfs"),
        "is a Git LFS pointer, not the image itself; run git lfs pull in its repository",
    ),
    (
        re.compile(rb"\s*+(?:(?:<\?xml|<!--).*?)?(?:<!doctype svg|<svg\b)", re.I | re.DOTALL),
        "is an SVG drawing, which has no pixels; convert it to PNG",
    ),
    (
        re.compile(
            rb"\s*+(?:(?><!--.*?-->)\s*+)*+<(?:!doctype html|html|head|body)\b", re.I | re.DOTALL
        ),
        "is a web page (HTML) that was saved instead of the image; download the image itself",
    ),
    (
        re.compile(rb"\s*<\?xml|\s*<Error>"),
        "is XML, often a server's error message; download the image again",
    ),
    (re.compile(rb"\x93NUMPY"), "is a NumPy array; save it as PNG"),
    (
        re.compile(rb"PK\x03\x04.{0,64}?/data\.pkl", re.DOTALL),
        "is a PyTorch file, which may hold code and is never opened; save the image as PNG",
    ),
    (
        re.compile(rb"\x80[\x02-\x05][\x8a\x95}(]c?|\x80[\x02-\x05]c|c\w+\n\w+\n"),
        "is a pickle, which may hold code and is never opened; save the image as PNG",
    ),
    (re.compile(rb"PK(?:\x03\x04|\x05\x06)"), "is a zip archive; unpack it"),
    (re.compile(rb"\x1f\x8b"), "is compressed with gzip; unpack it"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "is compressed with zstd; unpack it"),
    (re.compile(rb"7z\xbc\xaf|Rar!"), "is an archive; unpack it"),
    (
        re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"),
        "is PostScript, a program that is never run; convert it to PNG",
    ),
    (re.compile(rb"#!"), "is a script, not an image; give an image file"),
    (re.compile(rb"\x7fELF|MZ.{58}", re.DOTALL), "is a program, not an image; give an image file"),
    (re.compile(rb"8BPS"), "is a Photoshop file; export it as PNG"),
    (re.compile(rb"SIMPLE  ="), "is a FITS file; convert it to PNG"),
    (re.compile(rb".{128}DICM", re.DOTALL), "is a DICOM file; convert it to PNG"),
    (
        re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
        "is JPEG 2000, which is not read; convert it to PNG",
    ),
    (
        re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
        "is JPEG XL, which is not read; convert it to PNG",
    ),
    (
        re.compile(rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ", re.DOTALL),
        "is a video; save the frame that is meant as PNG or JPEG",
    ),
    (re.compile(rb"PAR1|ARROW1"), "is a table (Parquet or Arrow); give it as a data source"),
)


def image_format(data: bytes) -> str | None:
    """Pillow's name for the image format that the bytes begin with, `PDF` for a PDF, None for
    anything else.
    """
    for name, signature in _IMAGE_SIGNATURES:
        if signature.match(data):
            if name == "HEIF" and b"avif" in data[8:64]:  # one of its compatible brands
                return "AVIF"
            return name
    # PDF readers allow junk before the header (ISO 32000-1, implementation note 13)
    return "PDF" if _PDF.search(data, 0, 1024) else None


def why_no_image(data: bytes) -> str:
    """What the bytes are, since they are no image, and what to do: a clause that follows the
    image's name.
    """
    if not data:
        return "is an empty file; mend or replace it"
    head = data[:4096]
    text = head.removeprefix(b"\xef\xbb\xbf")
    for signature, reason in _REFUSED_SIGNATURES:
        if signature.match(text):
            return reason
    if not head.strip(b"\0"):
        return "holds only zero bytes, as a download that was never filled; get it again"
    return _why_text(data, text) or "is no image that can be read; convert it to PNG or JPEG"


def _why_text(data: bytes, head: bytes) -> str | None:
    try:
        # the last character of the head may be cut
        shown = head.decode() if len(head) == len(data) else head[:-4].decode("utf-8", "ignore")
        if len(head) < len(data):
            head[:-4].rstrip(bytes(range(0x80, 0x100))).decode()
    except UnicodeDecodeError:
        return None
    if not re.fullmatch(r"[^\x00-\x08\x0e-\x1f]*", shown):
        return None
    if shown.lstrip()[:1] in ("{", "["):
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            pass
        else:
            return "is JSON, often a server's error message; download the image again"
    start = " ".join(shown[:200].split())[:40]
    return f"is text, not an image (it begins {start!r}); give an image file"
