"""Local, severity-aware safety for chat models.

    from guardrail import Guard
    verdict = Guard().check(prompt="How do I pick a lock?", response="First, ...")
    verdict.action, verdict.severity, verdict.reasons

Importing this package opens no model and imports no heavy library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from guardrail.errors import (
    ArtifactError,
    Blocked,
    GuardrailError,
    MissingExtra,
    ModerationError,
    PolicyError,
    UpstreamError,
)
from guardrail.policy import Policy, Thresholds
from guardrail.taxonomy import TAXONOMY_VERSION, Category, Direction, Severity
from guardrail.verdict import Action, Assessment, Pair, Passage, Reason, Verdict

if TYPE_CHECKING:
    from guardrail.chat import ChatResult, GuardedChat
    from guardrail.guard import Guard
    from guardrail.moderator import Moderator, OnnxModerator

__version__ = "0.1.0"

__all__ = [
    "TAXONOMY_VERSION",
    "Action",
    "ArtifactError",
    "Assessment",
    "Blocked",
    "Category",
    "ChatResult",
    "Direction",
    "Guard",
    "GuardedChat",
    "GuardrailError",
    "MissingExtra",
    "ModerationError",
    "Moderator",
    "OnnxModerator",
    "Pair",
    "Passage",
    "Policy",
    "PolicyError",
    "Reason",
    "Severity",
    "Thresholds",
    "UpstreamError",
    "Verdict",
]

# Loaded on first use: they bring numpy, tokenizers and httpx along.
_LAZY = {
    "Guard": "guardrail.guard",
    "GuardedChat": "guardrail.chat",
    "ChatResult": "guardrail.chat",
    "Moderator": "guardrail.moderator",
    "OnnxModerator": "guardrail.moderator",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'guardrail' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
