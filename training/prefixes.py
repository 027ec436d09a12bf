"""How early in an answer its harm is caught: streams are judged on what there is so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from training.data import Example

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)


def prefix(text: str, share: float) -> str:
    """The first `share` of the text, cut back to a word's end; at least one word."""
    end = math.ceil(len(text) * share)
    if end >= len(text):
        return text
    while end < len(text) and not text[end].isspace() and not text[:end].strip():
        end += 1
    cut = text[:end]
    if end < len(text) and not text[end].isspace():
        whole = cut[: max((i for i, c in enumerate(cut) if c.isspace()), default=0)]
        cut = whole if whole.strip() else text.split(None, 1)[0]
    return cut


def prefixes(examples: Sequence[Example], share: float) -> list[Example]:
    """The examples with their answers cut."""
    return [replace(e, response=prefix(e.response or "", share)) for e in examples]


def caught_by(flagged: np.ndarray) -> list[dict[str, Any]]:
    """flagged: (shares, n) bool. Per share: flagged on that prefix; on it or a shorter one."""
    sofar = np.maximum.accumulate(flagged, axis=0)
    return [
        {"share": share, "flagged": float(now.mean()), "caught": float(until.mean())}
        for share, now, until in zip(SHARES, flagged, sofar, strict=True)
    ]
