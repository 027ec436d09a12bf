"""Scores of an exported artifact over many texts: what calibration, parity and evaluation share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from guardrail.encoding import Encoder, canonicalise
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


def cached_logits(
    moderator: OnnxModerator, pairs: Sequence[Pair], cache: Path | None, *, label: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """`text_logits`, kept in a file of `cache` named after the model's hash and the texts as the
    model sees them, so that a run that was stopped, or whose calibration alone has changed, judges
    nothing twice."""
    if cache is None or not pairs:
        return text_logits(moderator, pairs, label=label)
    texts = json.dumps([[_seen(pair.prompt), _seen(pair.response)] for pair in pairs])
    identity = [*sorted(moderator.manifest.files.items()), moderator.manifest.encoding, texts]
    key = hashlib.sha256(json.dumps(identity, default=dict).encode("utf-8")).hexdigest()[:24]
    path = cache / f"{key}.npz"
    if path.exists():
        with np.load(path) as known:
            return known["severity"], known["categories"]
    severity, categories = text_logits(moderator, pairs, label=label)
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f"{key}.partial.npz"
    np.savez(partial, severity=severity, categories=categories)
    os.replace(partial, path)
    return severity, categories


def _seen(text: str | None) -> str | None:
    return None if text is None else canonicalise(text).text
