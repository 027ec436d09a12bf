"""Scores of an exported artifact over many texts: what calibration, parity and evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from tqdm import tqdm

from guardrail.encoding import Encoder
from guardrail.moderator import OnnxModerator
from guardrail.verdict import Pair


def text_logits(
    moderator: OnnxModerator, pairs: Sequence[Pair], *, chunk: int = 256, label: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Raw logits per text, the highest over its windows: severity (n, 3), categories (n, 19)."""
    encoder = Encoder.from_file(
        moderator.folder / "tokenizer.json", moderator.manifest.encoder_config()
    )
    severity, categories = np.empty((len(pairs), 3)), np.empty((len(pairs), 19))
    for first in tqdm(range(0, len(pairs), chunk), desc=label, disable=len(pairs) <= chunk):
        groups = [encoder.encode(pair) for pair in pairs[first : first + chunk]]
        s, c = moderator.logits([window for group in groups for window in group])
        edges = np.cumsum([0, *(len(group) for group in groups)])
        for row, (a, b) in enumerate(pairwise(edges), first):
            severity[row], categories[row] = s[a:b].max(axis=0), c[a:b].max(axis=0)
    return severity, categories
