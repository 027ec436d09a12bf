"""PKU-SafeRLHF (Ji et al. 2024, arXiv:2406.15513) as examples: every answer as its people labelled
it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training.data import CATEGORIES, Example
from training.rows import each, published


def load_pku(name: str, split: str = "train") -> list[Example]:
    """PKU-SafeRLHF by hub name or local copy: one example per answer, labelled by PKU's people."""
    pairs = each(name, published(name, split), lambda row: list(from_pku(row)))
    return [example for pair in pairs for example in pair]


def from_pku(row: dict[str, Any]) -> Iterator[Example]:
    """The two answers of one PKU-SafeRLHF row (v1 field names)."""
    for side in (0, 1):
        harms = row.get(f"response_{side}_harm_category")
        severity = row.get(f"response_{side}_severity_level")
        safe = bool(row[f"is_response_{side}_safe"])
        names = [name for name, on in harms.items() if on] if harms is not None else None
        unknown = sorted(set(names or ()) - set(CATEGORIES))
        if unknown:
            raise SystemExit(f"PKU-SafeRLHF names categories this taxonomy lacks: {unknown}")
        yield Example(
            prompt=row["prompt"],
            response=row[f"response_{side}"],
            source=f"pku/{row.get(f'response_{side}_source', 'unknown')}",
            unsafe=not safe,
            severity=0 if safe else (int(severity) if severity else None),
            categories=[] if safe else names,
            origin={"unsafe": "human", "severity": "human", "categories": "human"},
        )
