"""`/v1/moderations`: OpenAI's request and answer, with our verdict beside it. Pure.

Shape: https://platform.openai.com/docs/api-reference/moderations. Each of our 19 categories stands
under the one of OpenAI's 13 that it is nearest to; those that nothing of ours stands under are not
judged, which `category_applied_input_types` says with an empty list.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from guardrail._server_errors import ApiError
from guardrail.taxonomy import Category
from guardrail.verdict import Action, Pair, Verdict

__all__ = ["OPENAI_CATEGORIES", "OPENAI_CATEGORY", "moderation_answer", "read_inputs"]

OPENAI_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)

OPENAI_CATEGORY = {
    Category.INSULTING_BEHAVIOR: "harassment",
    Category.DISCRIMINATORY_BEHAVIOR: "hate",
    Category.PSYCHOLOGICAL_HARM: "self-harm",  # wider: whatever hurts a mind
    Category.SEXUAL_CONTENT: "sexual",
    Category.VIOLENCE: "violence",
    Category.PHYSICAL_HARM: "violence",  # wider: also harm to oneself, and dangerous advice
    Category.ANIMAL_ABUSE: "violence",
    Category.ENDANGERING_NATIONAL_SECURITY: "illicit",
    Category.ENDANGERING_PUBLIC_HEALTH: "illicit",
    Category.COPYRIGHT_ISSUES: "illicit",
    Category.DRUGS: "illicit",
    Category.PRIVACY_VIOLATION: "illicit",
    Category.ECONOMIC_CRIME: "illicit",
    Category.MENTAL_MANIPULATION: "illicit",  # wider: wrong, and often no crime
    Category.HUMAN_TRAFFICKING: "illicit",
    Category.CYBERCRIME: "illicit",
    Category.DISRUPTING_PUBLIC_ORDER: "illicit",
    Category.ENVIRONMENTAL_DAMAGE: "illicit",
    Category.WHITE_COLLAR_CRIME: "illicit",
}


def read_inputs(body: Mapping[str, Any], most: int) -> list[Pair]:
    """The texts of a moderation request, one pair for each result: a string, a list of strings, or
    a list of content parts (which are one text together). `guardrail` may say that they are
    answers: `{"direction": "output"}`, or `{"prompt": "..."}`. Raises ApiError."""
    if "input" not in body:
        raise ApiError(400, "'input' is missing: it holds the text to judge", param="input")
    texts = _texts(body["input"])
    if len(texts) > most:
        raise ApiError(
            400, f"{len(texts)} inputs, and {most} are the most of one call: split it",
            code="too_many_inputs", param="input",
        )  # fmt: skip
    prompt = _prompt(body.get("guardrail"))
    return [Pair(text) if prompt is None else Pair(prompt, text) for text in texts]


def _texts(given: Any) -> list[str]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(isinstance(part, str) for part in given):
            return list(given)
        if all(isinstance(part, dict) for part in given):
            return ["\n".join(_part(part, i) for i, part in enumerate(given))]
    raise ApiError(
        400,
        "'input' must be a string, a list of strings, or a list of text parts, and not empty",
        param="input",
    )


def _part(part: Mapping[str, Any], i: int) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        kind = part.get("type")
        raise ApiError(
            400,
            f"only text can be judged, and input[{i}] is a part of type {kind!r}: leave it out",
            code="unsupported_input_type",
            param=f"input[{i}]",
        )
    return text


def _prompt(given: Any) -> str | None:
    """The prompt that the inputs answer, "" where it is not known, None where they are prompts."""
    if given is None:
        return None
    wrong = ApiError(
        400,
        "'guardrail' must be an object with a 'prompt' (a string), a 'direction' ('input' or "
        "'output'), or both",
        param="guardrail",
    )
    if not isinstance(given, dict) or not given.keys() <= {"prompt", "direction"}:
        raise wrong
    prompt, direction = given.get("prompt"), given.get("direction")
    if not isinstance(prompt, str | None) or direction not in (None, "input", "output"):
        raise wrong
    if direction == "input":
        if prompt is not None:
            raise ApiError(
                400, "what has a 'prompt' is an answer: its direction is 'output'",
                param="guardrail",
            )  # fmt: skip
        return None
    return prompt if prompt is not None else "" if direction == "output" else None


def moderation_answer(verdicts: Sequence[Verdict], model: str) -> dict[str, Any]:
    """The answer, one result per verdict."""
    return {
        "id": f"modr-{uuid.uuid4().hex}",
        "model": model,
        "results": [_result(verdict) for verdict in verdicts],
    }


def _result(verdict: Verdict) -> dict[str, Any]:
    judged = dict.fromkeys(OPENAI_CATEGORY.values())
    held = {OPENAI_CATEGORY[reason.category] for reason in verdict.reasons}
    scores = dict.fromkeys(OPENAI_CATEGORIES, 0.0)
    if verdict.assessment is not None:
        for category, probability in verdict.assessment.categories.items():
            name = OPENAI_CATEGORY[category]
            scores[name] = max(scores[name], min(1.0, max(0.0, float(probability))))
    return {
        # What is withheld for another reason (unreadable, degraded) is flagged as well.
        "flagged": bool(held) or verdict.action > Action.ALLOW,
        "categories": {name: name in held for name in OPENAI_CATEGORIES},
        "category_scores": scores,
        "category_applied_input_types": {
            name: ["text"] if name in judged else [] for name in OPENAI_CATEGORIES
        },
        "guardrail": verdict.to_json(),
    }
