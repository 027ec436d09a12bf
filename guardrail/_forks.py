"""What a forked child has to make anew: of its parent's threads, locks and connections it has
copies, which no thread serves there, or which both would share."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["renewed_in_children"]


class _Renewable(Protocol):
    def _after_fork(self) -> None:
        """Called in a forked child, before anything else happens there."""
        ...


_ALL: weakref.WeakSet[_Renewable] = weakref.WeakSet()


def renewed_in_children(made: _Renewable) -> None:
    """From now on `made._after_fork()` runs in every forked child, as long as `made` lives."""
    _ALL.add(made)


def _after_fork() -> None:
    for made in list(_ALL):
        made._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
