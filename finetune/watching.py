"""The report of a run, live, on this machine alone: made anew whenever it is looked at."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from finetune.errors import RunDirError
from finetune.report import gather, render
from finetune.rundir import RunDir

REFRESH_SECONDS = 10
HOSTS = ("127.0.0.1", "localhost")


def watching(run: RunDir, port: int) -> ThreadingHTTPServer:
    """A server of the page on loopback, not yet answering; port 0 takes a free one.

    The page loads itself again until the run has finished. Raises `RunDirError` where the port is
    taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in HOSTS:  # a page elsewhere, whose name was made to point here
                self.send_error(403, "only for this machine")
            elif self.path != "/":
                self.send_error(404)
            else:
                self._answer(_page(run).encode())

        def _answer(self, page: bytes) -> None:
            self.send_response(200)
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


def _page(run: RunDir) -> str:
    found = gather(run)
    return render(found, refresh_seconds=None if found["finished"] else REFRESH_SECONDS)
