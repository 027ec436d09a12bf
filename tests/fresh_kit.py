"""A Python of its own, for what must not happen in that of the tests: forks, and an end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def run_fresh(program: str, *args: str) -> str:
    """What the program says on stdout; it has to end well, within two minutes."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *args],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
