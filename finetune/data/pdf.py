"""Pages of PDF files as images, by pypdfium2 (an optional package)."""

import math
import threading
from typing import Any

from PIL import Image

from finetune.errors import DataError

# PDFium is not safe to call from several threads (pypdfium2's README, "Thread incompatibility")
_ONE_AT_A_TIME = threading.Lock()
_POINTS_PER_INCH = 72


def render_page(data: bytes, page: int | None, *, dpi: int, max_megapixels: float) -> Image.Image:
    """One page as RGB on white, form fields filled in; `page` counts from 1, None is the only one.

    Raises `DataError` with a clause that follows the file's name.
    """
    try:
        import pypdfium2
    except ImportError:
        raise DataError(
            "is a PDF, which needs another package: pip install 'vlm-recipes[pdf]'"
        ) from None
    # PDFium mends what it can, and a page whose drawing was cut off comes out blank
    if b"%%EOF" not in data[-1024:]:
        raise DataError("is a PDF that is cut short (its end is missing); mend or replace it")
    with _ONE_AT_A_TIME:
        try:
            document = pypdfium2.PdfDocument(data)
            try:
                return _render(document, page, dpi=dpi, max_megapixels=max_megapixels)
            finally:
                document.close()
        except pypdfium2.PdfiumError as error:
            if "password" in str(error).lower():
                raise DataError("is a PDF with a password; save it without one") from error
            raise DataError(f"is a PDF that cannot be read ({error}); mend it") from error


def _render(document: Any, page: int | None, *, dpi: int, max_megapixels: float) -> Image.Image:
    num_pages = len(document)
    if num_pages == 0:
        raise DataError("is a PDF without a page; mend or replace it")
    if page is None and num_pages > 1:
        raise DataError(f"is a PDF of {num_pages:,} pages; name one as FILE.pdf#page=1")
    if page is not None and not 1 <= page <= num_pages:
        raise DataError(f"is a PDF of {num_pages:,} pages and has no page {page}; name another")
    document.init_forms()
    sheet = document[(page or 1) - 1]
    scale = dpi / _POINTS_PER_INCH
    width_points, height_points = sheet.get_size()
    if not 0 < width_points * height_points < math.inf:
        raise DataError("is a PDF page without a size; mend or replace it")
    width, height = math.ceil(width_points * scale), math.ceil(height_points * scale)
    if width * height > max_megapixels * 1e6:
        raise DataError(
            f"is a PDF page of {width:,} x {height:,} pixels at {dpi} dpi, more than "
            f"{max_megapixels:g} megapixels; lower data.pdf_dpi, or raise data.max_megapixels"
        )
    return sheet.render(scale=scale).to_pil().convert("RGB")
