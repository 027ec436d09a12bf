"""A command that is told to stop while it works."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def terminated(line: Sequence[str], environment: Mapping[str, str], at: str) -> tuple[str, str]:
    """Run a command, and send it SIGTERM at the first line it prints that begins with `at`. It has
    to end with the status that shells give, and without a traceback. What it printed afterwards,
    and its errors."""
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for text in process.stdout:
            if text.startswith(at):
                process.send_signal(signal.SIGTERM)
                break
        rest, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    return rest, errors
