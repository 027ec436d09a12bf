"""Where a call of the `openai` client goes, as a server may read its path. Pure.

A path is normalised between our check and the server: by httpx, which takes dot segments away and
drops a host before a relative path, and by proxies and servers, which decode it, once or twice.
So a path that anything could read as another one is refused.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from guardrail.errors import GuardrailError

__all__ = ["call_path", "check_deployment", "is_stored_response", "passes"]

# Their answers hold nothing that a chat model says to a user now.
_PASS = re.compile(
    "(embeddings|models|files|moderations|audio|images|videos|fine_tuning|vector_stores|batches|"
    "uploads|containers|evals|skills|organization|projects|safety|vaults|responses/input_tokens|"
    "content_provenance_checks|webhook_endpoints|webhook_event_types)(/|$)"
)
# These hand out what models wrote: the answers of a batch, files that code made, samples of an
# evaluation, what was understood of a recording.
_WRITTEN = re.compile(
    r"(^|/)(files|containers|evals|audio)/(.+/)?(content|output_items|transcriptions|translations)"
    r"(;[^/]*)?(/|$)",
    re.IGNORECASE,
)
# Some hosts have an API for each model, below its name: models/NAME/v1/chat/completions.
_GENERATES = re.compile(r"(^|/)(completions|responses|messages)(;[^/]*)?$", re.IGNORECASE)
_STORED = re.compile("responses/[^/]+")


def call_path(url: str) -> str:
    """The decoded path of a call, relative to the API's base, without slashes around it.

    Raises GuardrailError for a path whose meaning depends on who reads it: another host, dot
    segments, empty segments, backslashes, control characters, encoded or not.
    """
    path = _decoded(re.split("[?#]", url, maxsplit=1)[0])
    try:
        parts = urlsplit(url)
        elsewhere = bool(parts.scheme or parts.netloc)
    except ValueError:
        elsewhere = True
    if elsewhere or not _is_plain(path.removeprefix("/").removesuffix("/")):
        raise GuardrailError(
            f"the path {url!r} could be read as another one: write it below the base URL, without "
            "a host, dot segments, empty segments or backslashes"
        )
    return path.strip("/")


def check_deployment(model: object) -> None:
    """Raises GuardrailError for a model's name that cannot be a part of a path: an Azure client
    makes it one, and some versions of it do so as it is."""
    if isinstance(model, str) and not _is_plain(_decoded(model), also="?#"):
        raise GuardrailError(f"the model {model!r} could be read as a path: use its plain name")


def passes(method: str, path: str) -> bool:
    """Whether a call needs no guard."""
    if method == "DELETE":
        return True
    if _WRITTEN.search(path):
        return False
    return bool(_PASS.match(path)) and not (method != "GET" and _GENERATES.search(path))


def is_stored_response(method: str, path: str) -> bool:
    """Whether a call reads, or cancels, a response that the API holds."""
    if path.endswith("/cancel"):
        return method == "POST" and bool(_STORED.fullmatch(path.removesuffix("/cancel")))
    return method == "GET" and bool(_STORED.fullmatch(path))


def _decoded(text: str) -> str:
    while (shorter := unquote(text)) != text:
        text = shorter
    return text


def _is_plain(path: str, also: str = "") -> bool:
    """Whether every reader takes each segment of a path for a name."""
    if not path.isprintable() or any(c in path for c in "\\" + also):
        return False
    # Some servers cut what stands behind a semicolon before they look for dots.
    names = [segment.partition(";")[0].strip() for segment in path.split("/")]
    return path == "" or not any(name in ("", ".", "..") for name in names)
