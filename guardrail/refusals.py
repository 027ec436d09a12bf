"""What a caller reads instead of a text that was withheld, and what a model is told when it has to
answer again. The texts of each language are in `guardrail/languages`; a policy may say its own.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from guardrail.policy import Policy
from guardrail.taxonomy import Category
from guardrail.verdict import Verdict

__all__ = ["SAFETY_INSTRUCTION", "refusal_text"]

SAFETY_INSTRUCTION = (
    "Your last answer was withheld because it could cause harm. Answer again, safely: leave out "
    "instructions, details and wording that could hurt someone, break the law, demean people or "
    "expose personal data. Help with what is harmless in the request, and say plainly what you "
    "cannot help with."
)

_SELF_HARM = {Category.PHYSICAL_HARM, Category.PSYCHOLOGICAL_HARM}
_UNSPACED = ("ja", "zh")


def refusal_text(verdict: Verdict, policy: Policy) -> str:
    """The refusal for a withheld text: the policy's own, as it is, or a polite default in its
    language that names the leading category, with crisis resources where someone may be about to
    be hurt."""
    leading = verdict.reasons[0].category if verdict.reasons else None
    own = policy.refusals.get(leading, "") if leading is not None else ""
    for said in (own, policy.refusal):
        if said.strip():
            return said
    texts = _texts(policy.language)
    if verdict.degraded or leading is None:
        excuse: str = texts["unchecked" if verdict.degraded else "unreadable"]
        return excuse
    text: str = texts[verdict.direction.value].format(topic=texts["topics"][leading.value])
    if _SELF_HARM.isdisjoint(reason.category for reason in verdict.reasons):
        return text
    space = "" if policy.language in _UNSPACED else " "
    return f"{text}{space}{texts['crisis']}"


@cache
def _texts(language: str) -> dict[str, Any]:
    file = resources.files("guardrail").joinpath(f"languages/{language}.toml")
    return tomllib.loads(file.read_text(encoding="utf-8"))
