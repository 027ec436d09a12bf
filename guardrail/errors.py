"""Every error that guardrail raises on purpose.

    GuardrailError
    ├── ArtifactError      a model folder is missing, incomplete, altered or of another taxonomy
    ├── PolicyError        (also ValueError) a policy file says something it cannot mean
    ├── ModerationError    a moderator could not judge a text
    │   └── Overloaded     it has too much to do already; says when to try again
    ├── UpstreamError      the chat model behind the guard failed or answered with nonsense
    ├── Blocked            a text was not deliverable and the caller asked for on_block="raise"
    └── MissingExtra       (also ImportError) an optional dependency is not installed

A block is a result, not an error: `Blocked` is raised only where a caller opts in.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guardrail.verdict import Verdict

__all__ = [
    "ArtifactError",
    "Blocked",
    "GuardrailError",
    "MissingExtra",
    "ModerationError",
    "Overloaded",
    "PolicyError",
    "UpstreamError",
]


class GuardrailError(Exception):
    """Base of all errors of this package; its text says what happened, why, and what to do."""


class ArtifactError(GuardrailError):
    """A model folder cannot be trusted or read."""


class PolicyError(GuardrailError, ValueError):
    """A policy is not valid; the text names the file, the key and the nearest right word."""


class ModerationError(GuardrailError):
    """A moderator failed on a text. `Guard` turns it into the policy's `on_error` action."""


class Overloaded(ModerationError):  # noqa: N818 - a state, and one that passes
    """There is no room for another text now. `retry_after`: seconds until there should be."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UpstreamError(GuardrailError):
    """The guarded chat model could not be reached, or did not answer as its API promises.

    `status` is the HTTP status where there was one; `said` how the server itself puts what went
    wrong, where it does, in 200 characters or so. It is for logs: of an answer that failed midway
    (status 500 and up, an error event in a stream) it may quote what the model wrote, which nobody
    has judged, so that the text of this error leaves it out.
    """

    def __init__(self, message: str, *, status: int | None = None, said: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.said = said


class Blocked(GuardrailError):  # noqa: N818 - a block is a result, no error
    """Raised instead of a refusal when a caller asks for `on_block="raise"`."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.summary())
        self.verdict = verdict

    def __reduce__(self) -> tuple[type[Blocked], tuple[Verdict]]:
        return Blocked, (self.verdict,)  # pickled as made: from a verdict, not from its text


class MissingExtra(GuardrailError, ImportError):  # noqa: N818 - it names what is amiss
    """An optional dependency is missing; the text holds the pip line that installs it."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional `module`, or raise `MissingExtra` with the pip line that cures it."""
    cure = f"pip install 'guardrail-severity[{extra}]'"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise  # the module is there, something it needs is not: that error says more
        raise MissingExtra(f"{module} is not installed; it comes with: {cure}") from error
    if found.__file__ is None:  # Python imports an empty folder without a word
        folder = next(iter(found.__path__))
        raise MissingExtra(f"{module} was uninstalled in part: delete {folder}, then {cure}")
    return found
