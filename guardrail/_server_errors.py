"""What `guardrail serve` answers when it cannot do what was asked: OpenAI's error shape, for its
own refusals and for what goes wrong upstream; and how every answer becomes JSON. Pure.

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import openai
from starlette.responses import JSONResponse

from guardrail.upstream_faults import retry_after as wanted_by
from guardrail.upstream_faults import without_secrets

__all__ = ["ApiError", "Json", "json_bytes", "upstream_fault"]

_WORD = re.compile(r"[\w.*\[\]-]{1,64}", re.ASCII)

# The caller's own faults, in the words of the upstream; all others are between it and us.
_CALLERS = {400, 404, 409, 413, 415, 422}


def json_bytes(data: Any) -> bytes:
    """Valid JSON in UTF-8, whatever an upstream put into `data`: half of a surrogate pair (an emoji
    that was cut in two) becomes `?`, a number that is not finite null."""
    try:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return json_bytes(content)


class ApiError(Exception):
    """An answer with `status` and `{"error": {message, type, param, code}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        kind: str = "invalid_request_error",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.kind = kind
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def upstream_fault(
    error: Exception, name: str, *, retry_after: int, forwarded: bool, secrets: Sequence[str] = ()
) -> ApiError:
    """The answer to a caller whose upstream `name` failed with `error`. What an upstream says of
    failing midway is not in it: some quote what their model wrote, which nobody has judged.

    forwarded: the caller's own key was sent, so that its refusal is the caller's to cure. No text
    of the answer holds one of `secrets`.
    """
    where = f"the upstream {name!r}"

    def fault(status: int, message: str, code: str) -> ApiError:
        return ApiError(status, _clean(message, secrets), code=code, kind="upstream_error")

    if isinstance(error, openai.APITimeoutError):
        return fault(504, f"{where} did not answer in time", "upstream_timeout")
    if isinstance(error, openai.APIConnectionError):
        return fault(
            502, f"{where} cannot be reached, or broke off the answer", "upstream_unreachable"
        )
    if isinstance(error, openai.APIStatusError):
        return _refused(error, where, retry_after, forwarded, secrets)
    if isinstance(error, openai.APIError):  # an error event in a stream
        return fault(502, f"{where} broke off the answer with an error", "upstream_error")
    return fault(502, f"{where} answered with what is no chat completion", "upstream_invalid")


def _refused(
    error: openai.APIStatusError,
    where: str,
    retry_after: int,
    forwarded: bool,
    secrets: Sequence[str],
) -> ApiError:
    status = error.status_code
    body: Mapping[str, Any] = error.body if isinstance(error.body, Mapping) else {}
    said = str(body.get("message") or error.message)
    if status == 429:
        wait = wanted_by(error.response.headers.get("retry-after"))
        return ApiError(
            429,
            _clean(f"{where} takes no more requests now: {said}", secrets),
            code="upstream_rate_limit",
            kind="requests",
            headers={"Retry-After": str(retry_after if wait is None else math.ceil(wait))},
        )
    if status in _CALLERS or (forwarded and status in (401, 403)):
        return ApiError(
            status,
            _clean(said, secrets),
            code=_word(body.get("code"), secrets),
            kind=_word(body.get("type"), secrets) or "invalid_request_error",
            param=_word(body.get("param"), secrets),
        )
    if status in (401, 403):
        return ApiError(
            502,
            f"{where} does not take this server's key (HTTP {status}): check its api_key_env",
            code="upstream_auth",
            kind="upstream_error",
        )
    return ApiError(
        502,
        f"{where} answered HTTP {status}: why is in its log",
        code=f"upstream_{status}",
        kind="upstream_error",
    )


def _word(value: object, secrets: Sequence[str]) -> str | None:
    """A name, a number or a path such as `messages[0].role`; None for what may be a text."""
    said = _clean(str(value), secrets)
    return said if value is not None and _WORD.fullmatch(said) else None


def _clean(text: str, secrets: Sequence[str]) -> str:
    """On one line, short, and without secrets."""
    text = without_secrets(text, secrets)
    return text if len(text) <= 500 else f"{text[:500]}..."
