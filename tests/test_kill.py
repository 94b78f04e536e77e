"""Runs killed at random moments end as those that were not."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bytes_of_the_unbroken_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.kill_test", "--kills", "6", "--seed", "2"],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 ended as the run that was not killed" in done.stdout
    for words in ("| checkpoint-", "held-out rows were answered", "a checkpoint was written"):
        assert words in done.stdout, done.stdout
