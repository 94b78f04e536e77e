"""The report of a run, live, on this machine alone: made anew whenever it is looked at."""

import html
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from finetune.errors import RunDirError
from finetune.report import gather, render
from finetune.rundir import RunDir

REFRESH_SECONDS = 10
STILL = "/still"
BAD_STEP = re.compile(r"/bad_steps/(step-\d+\.html)")
HOSTS = ("127.0.0.1", "localhost")
FAILED = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{seconds}">
<title>no report</title></head>
<body><p>The report could not be made: {error}. It is tried again every {seconds} seconds.</p>
</body></html>
"""
drawing = threading.Lock()  # matplotlib's settings are those of all threads


def watching(run: RunDir, port: int) -> ThreadingHTTPServer:
    """A server of the page on loopback, not yet answering; port 0 takes a free one.

    The page loads itself again until the run has finished, also where it could not be made; at
    `/still` it does not, so that it can be read. Raises `RunDirError` where the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").partition(":")[0]  # without a port at port 80
            if host not in HOSTS:  # a page elsewhere, whose name was made to point here
                self.send_error(403, "only for this machine")
            elif shown := self._page_of_bad_step():
                self._answer(200, shown)
            elif self.path not in ("/", STILL):
                self.send_error(404)
            else:
                status, page = _page(run, still=self.path == STILL)
                self._answer(status, page.encode())

        def handle(self) -> None:
            with suppress(ConnectionError):  # the tab was closed meanwhile
                super().handle()

        def _page_of_bad_step(self) -> bytes:
            """That the report links to; empty where another path is asked for."""
            found = BAD_STEP.fullmatch(self.path)
            page = run.bad_steps / found[1] if found else None
            return page.read_bytes() if page and page.is_file() else b""

        def _answer(self, status: int, page: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *_: Any) -> None:
            """Nothing: every refresh would be a line."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise RunDirError(f"--port {port}: cannot be listened at ({error.strerror})") from error


def _page(run: RunDir, *, still: bool) -> tuple[int, str]:
    try:
        with drawing:
            found = gather(run)
            if found["finished"]:
                return 200, render(found)
            if still:
                return 200, render(found, elsewhere="/")
            return 200, render(found, refresh_seconds=REFRESH_SECONDS, elsewhere=STILL)
    except Exception as error:  # whatever it is, the files may be whole when looked at again
        words = html.escape(f"{type(error).__name__}: {error}")
        return 500, FAILED.format(seconds=REFRESH_SECONDS, error=words)
