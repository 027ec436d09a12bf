"""How a command ends: errors and signals in one line. Without torch, which is slow to import."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from guardrail.errors import GuardrailError

__all__ = ["SIGNALS", "ends_in_a_line", "in_a_line", "stopped"]


def in_a_line(error: Exception | str) -> str:
    """What libraries say over many lines, in one."""
    text = " ".join(str(error).split())
    return text if len(text) < 300 else f"{text[:300]}..."


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stopped(number: int, message: str) -> SystemExit:
    """To be raised at a signal: `message` is printed, the exit status is a shell's (130, 143)."""
    print(message, file=sys.stderr, flush=True)
    error = SystemExit(message)
    error.code = 128 + number
    return error


@contextmanager
def ends_in_a_line(kept: str) -> Iterator[None]:
    """SIGINT and SIGTERM end what is within at once, by `stopped`, and so does an error of the SDK
    or of a file, such as a model that is not there: both in a line, without a traceback.

    kept: what of the work is kept, and what the same command does when it is given again.
    """

    def end(number: int, _: object) -> None:
        raise stopped(number, f"stopped: {kept}")

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    except (GuardrailError, OSError) as error:
        raise SystemExit(in_a_line(error)) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
