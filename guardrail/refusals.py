"""What a caller reads instead of a text that was withheld, and what a model is told when it has to
answer again. English; a policy's `refusal` replaces the refusals. Pure.
"""

from __future__ import annotations

from guardrail.policy import Policy
from guardrail.taxonomy import Category, Direction
from guardrail.verdict import Verdict

__all__ = ["SAFETY_INSTRUCTION", "refusal_text"]

SAFETY_INSTRUCTION = (
    "Your last answer was withheld because it could cause harm. Answer again, safely: leave out "
    "instructions, details and wording that could hurt someone, break the law, demean people or "
    "expose personal data. Help with what is harmless in the request, and say plainly what you "
    "cannot help with."
)

_TOPICS = {
    Category.ENDANGERING_NATIONAL_SECURITY: "threats to national security",
    Category.INSULTING_BEHAVIOR: "insulting or demeaning people",
    Category.DISCRIMINATORY_BEHAVIOR: "discrimination against people",
    Category.ENDANGERING_PUBLIC_HEALTH: "endangering public health",
    Category.COPYRIGHT_ISSUES: "infringing copyright",
    Category.VIOLENCE: "violence",
    Category.DRUGS: "illegal drugs",
    Category.PRIVACY_VIOLATION: "violating someone's privacy",
    Category.ECONOMIC_CRIME: "fraud and other economic crime",
    Category.MENTAL_MANIPULATION: "manipulating people",
    Category.HUMAN_TRAFFICKING: "human trafficking",
    Category.PHYSICAL_HARM: "physical harm",
    Category.SEXUAL_CONTENT: "sexual content",
    Category.CYBERCRIME: "cybercrime",
    Category.DISRUPTING_PUBLIC_ORDER: "disrupting public order",
    Category.ENVIRONMENTAL_DAMAGE: "damaging the environment",
    Category.PSYCHOLOGICAL_HARM: "psychological harm",
    Category.WHITE_COLLAR_CRIME: "white-collar crime",
    Category.ANIMAL_ABUSE: "cruelty to animals",
}

# No phone number is right in every country; these two ways are.
_CRISIS = (
    "If you or someone near you may be in danger, call your local emergency number now. To talk "
    "to someone about thoughts of suicide or self-harm, find a free helpline in your country at "
    "https://findahelpline.com."
)
_SELF_HARM = {Category.PHYSICAL_HARM, Category.PSYCHOLOGICAL_HARM}


def refusal_text(verdict: Verdict, policy: Policy) -> str:
    """The refusal for a withheld text: the policy's own, as it is, or a polite default that names
    the leading category, with crisis resources where someone may be about to be hurt."""
    if policy.refusal:
        return policy.refusal
    held = {reason.category for reason in verdict.reasons}
    if verdict.degraded:
        return (
            "I'm sorry, this could not be checked for safety, so I can't go on. Please try again."
        )
    if not held:
        return "I'm sorry, but I can't read this well enough to answer it. Please put it plainly."
    topic = _TOPICS[verdict.reasons[0].category]
    if verdict.direction is Direction.INPUT:
        text = f"I'm sorry, but I can't help with {topic}."
    else:
        text = f"I'm sorry, but I can't give this answer: it touches on {topic}."
    return f"{text} {_CRISIS}" if held & _SELF_HARM else text
