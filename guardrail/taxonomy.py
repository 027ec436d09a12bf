"""The words of the field: harm categories, severities, directions. Pure, standard library only.

Categories and severities are those of PKU-SafeRLHF (arXiv 2406.15513): 19 categories that a text
may combine, and an ordinal severity that grows with the scope of the harm.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

__all__ = ["TAXONOMY_VERSION", "Category", "Direction", "Severity"]

TAXONOMY_VERSION = "pku-saferlhf-19@1"


class Severity(IntEnum):
    """How far a harm reaches: none < minor < moderate < severe (0-3)."""

    NONE = 0
    MINOR = 1
    MODERATE = 2
    SEVERE = 3

    @property
    def label(self) -> str:
        """The word used in JSON, TOML and on screen: `none`, `minor`, `moderate`, `severe`."""
        return self.name.lower()

    @classmethod
    def from_label(cls, label: str) -> Severity:
        """Inverse of `label`; raises ValueError on any other word."""
        for severity in cls:
            if severity.label == label:
                return severity
        raise ValueError(f"{label!r} is not a severity ({', '.join(s.label for s in cls)})")


class Category(StrEnum):
    """The 19 harm categories, in PKU-SafeRLHF's order; a value is the data set's own name."""

    ENDANGERING_NATIONAL_SECURITY = "Endangering National Security"
    INSULTING_BEHAVIOR = "Insulting Behavior"
    DISCRIMINATORY_BEHAVIOR = "Discriminatory Behavior"
    ENDANGERING_PUBLIC_HEALTH = "Endangering Public Health"
    COPYRIGHT_ISSUES = "Copyright Issues"
    VIOLENCE = "Violence"
    DRUGS = "Drugs"
    PRIVACY_VIOLATION = "Privacy Violation"
    ECONOMIC_CRIME = "Economic Crime"
    MENTAL_MANIPULATION = "Mental Manipulation"
    HUMAN_TRAFFICKING = "Human Trafficking"
    PHYSICAL_HARM = "Physical Harm"
    SEXUAL_CONTENT = "Sexual Content"
    CYBERCRIME = "Cybercrime"
    DISRUPTING_PUBLIC_ORDER = "Disrupting Public Order"
    ENVIRONMENTAL_DAMAGE = "Environmental Damage"
    PSYCHOLOGICAL_HARM = "Psychological Harm"
    WHITE_COLLAR_CRIME = "White-Collar Crime"
    ANIMAL_ABUSE = "Animal Abuse"


class Direction(StrEnum):
    """Which side of the chat a text is on: `input` (to the model) or `output` (from it)."""

    INPUT = "input"
    OUTPUT = "output"
