"""Log probabilities beside an answer: those of the tokens that spell what was judged. Pure.

What else stands there is text that nobody judged: the tokens of a withheld or masked answer, of a
model's reasoning, the alternatives (`top_logprobs`). It does not go out.
"""

from __future__ import annotations

from typing import Any

__all__ = ["of_text"]


def of_text(tokens: Any, text: str) -> list[dict[str, Any]] | None:
    """Of `tokens` (JSON data of https://platform.openai.com/docs/api-reference/chat/object,
    `logprobs.content`) those that spell `text`, without alternatives; None where none do."""
    wanted = text.strip()
    found: list[dict[str, Any]] = []
    try:
        spelled = [bytes(t.get("bytes") or t["token"].encode()) for t in tokens or ()]
        # The last place: a model reasons before it answers.
        first = b"".join(spelled).rfind(wanted.encode())
        last, at = first + len(wanted.encode()), 0
        kept = b""
        for token, said in zip(tokens or (), spelled, strict=True):
            if at < last and at + len(said) > first:
                kept += said
                found.append(
                    {
                        "token": said.decode(errors="replace"),
                        "bytes": list(said),
                        "logprob": float(token["logprob"]),
                        "top_logprobs": [],
                    }
                )
            at += len(said)
        # A token may have white space that the text has lost, and nothing else.
        spells = first >= 0 and bool(wanted) and kept.decode().strip() == wanted
    except (AttributeError, KeyError, TypeError, ValueError):  # of another shape
        return None
    return found if spells else None
