"""Bring your own detector: anything with `id`, `thresholds` and `assess` can stand behind a Guard.

    python examples/custom_moderator.py

This one finds e-mail addresses and nothing else. It says where they are, so that a policy can
redact them instead of refusing the whole answer.
"""

import re
from collections.abc import Mapping, Sequence

from guardrail import (
    Assessment,
    Category,
    Direction,
    Guard,
    GuardedChat,
    Pair,
    Passage,
    Severity,
    Thresholds,
)

EMAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.]*\w")


class EmailModerator:
    id = "e-mail-1"  # names it in verdicts and logs
    thresholds: Mapping[Direction, Thresholds] = {}  # all count from 0.5

    def assess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        return [self._assess(pair) for pair in pairs]

    def _assess(self, pair: Pair) -> Assessment:
        found = [Passage(*match.span(), probability=1.0) for match in EMAIL.finditer(pair.text)]
        worst = Severity.MODERATE if found else Severity.NONE
        return Assessment(
            direction=pair.direction,
            severity_probabilities={s: float(s is worst) for s in Severity},
            categories={
                c: float(bool(found) and c is Category.PRIVACY_VIOLATION) for c in Category
            },
            passages=tuple(found),
            model=self.id,
        )


guard = Guard(EmailModerator(), policy="balanced")
verdict = guard.check("Who wrote this?", "Write to ada@example.org.")
print("verdict:", verdict.summary())

# "balanced" redacts personal data in answers, streamed or not.
chat = GuardedChat(lambda messages: "Write to ada@example.org, she knows.", guard)
print("answer:", chat.complete("Who wrote this?").text)
print("stream:", "".join(chat.stream("Who wrote this?")))
