"""A calibrated policy as TOML that a person can read, and change."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from guardrail._calibrate import Fitted
from guardrail.errors import PolicyError
from guardrail.policy import LEVELS, PRESETS, Policy
from guardrail.taxonomy import Category, Direction, Severity

__all__ = ["extends_of", "policy_toml", "read_back"]


def extends_of(policy: str, folder: Path) -> str:
    """What `extends` says in a file of this folder: a preset, or the way to another file."""
    if policy in PRESETS:
        return policy
    # A way up leads out of where a folder is, not out of a link to it.
    file = os.path.join(os.path.realpath(os.path.dirname(policy)), os.path.basename(policy))
    return Path(os.path.relpath(file, os.path.realpath(folder))).as_posix()


def policy_toml(name: str, extends: str, comment: Sequence[str], fitted: Sequence[Fitted]) -> str:
    """The file's text; what is not in it is inherited."""
    lines = [*(f"# {line}" for line in comment), f"name = {_text(name)}"]
    lines.append(f"extends = {_text(extends)}")
    for found in fitted:
        lines += _direction(found)
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    # A JSON string is a TOML basic string, DEL aside.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _direction(found: Fitted) -> Iterator[str]:
    key = found.direction.value
    if found.severity:
        yield ""
        yield f"[{key}.thresholds]"
        for level, value in sorted(found.severity.items()):
            yield f"{level.label} = {value:.4f}{_why(found, level)}"
    for category, threshold in found.categories.items():
        yield ""
        yield f"[{key}.categories.{_text(category.value)}]"
        yield f"threshold = {threshold.value:.4f}"


def _why(found: Fitted, level: Severity) -> str:
    if found.promise is not None and found.promise.lowered and level in found.promise.levels:
        return "  # lowered for the promise"
    if found.minor is not None and level is Severity.MINOR:
        return f"  # 95 % interval {found.minor.low:.4f}-{found.minor.high:.4f}"
    return ""


def read_back(path: Path, expected: Policy) -> None:
    """Raises PolicyError unless the file, as written, decides like the policy that was meant."""
    found = Policy.load(path)
    for direction in Direction:
        ours, theirs = found.rules(direction), expected.rules(direction)
        alike = all(
            ours.action(category, level) is theirs.action(category, level)
            for category in Category
            for level in LEVELS
        )
        if not alike or (ours.thresholds, ours.category_severity) != (
            theirs.thresholds,
            theirs.category_severity,
        ):
            raise PolicyError(f"{path}: does not read back as the policy that was fitted")
