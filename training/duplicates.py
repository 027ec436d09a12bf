"""Texts that are nearly the same, by their sets of words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

__all__ = ["near_duplicate_groups"]


def near_duplicate_groups(texts: Sequence[str], threshold: float = 0.8) -> list[int]:
    """Group id per text; texts whose word sets have Jaccard >= `threshold` share one.

    Exact all-pairs by prefix filtering: sorted by rarity, two such sets share one of their first
    `len - ceil(threshold * len) + 1` words (Chaudhuri et al. 2006).
    """
    parent = list(range(len(texts)))

    def find(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    sets = [frozenset(text.split()) for text in texts]
    frequency = Counter(word for words in sets for word in words)
    index: dict[str, list[int]] = defaultdict(list)
    for item in sorted(range(len(sets)), key=lambda i: len(sets[i])):
        words = sorted(sets[item], key=lambda w: (frequency[w], w))
        prefix = words[: len(words) - int(np.ceil(threshold * len(words))) + 1]
        for candidate in {c for word in prefix for c in index[word]}:
            small, large = sets[candidate], sets[item]
            if len(small) < threshold * len(large):
                continue
            shared = len(small & large)
            if shared >= threshold * (len(small) + len(large) - shared):
                parent[find(item)] = find(candidate)
        for word in prefix:
            index[word].append(item)
    return [find(item) for item in range(len(texts))]
