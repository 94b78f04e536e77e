"""Pages opened in Chromium, without a window."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and "REQUIRE_BROWSER" not in os.environ,
    reason="needs Chromium (apt-get install chromium)",
)


def run_chromium(action: str, page: Path, *flags: str) -> str:
    """What Chromium prints."""
    return opened_in_chromium(action, page, *flags).stdout


def opened_in_chromium(action: str, page: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    """A profile of its own, so that tests side by side do not meet."""
    assert CHROMIUM is not None, "Chromium is not installed (apt-get install chromium)"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        own = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command = [CHROMIUM, *own, *flags, action, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
