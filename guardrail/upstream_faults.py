"""What is said when a chat model behind a URL fails: one line, its cure, and no secrets; and when
it may be asked again."""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from httpx_sse import SSEError

from guardrail.errors import UpstreamError

__all__ = ["Faults", "retry_after", "secrets_of", "without_secrets"]

_CURES = {
    401: "the API key is missing or wrong: pass api_key=",
    403: "the API key may not use this model",
    404: "no such path or model: check the URL (it often ends in /v1) and the name of the model",
    429: "too many requests: slow down, or raise retries",
}


# A server that fails midway may quote what its model wrote, such as a tool call it cannot read.
_UNQUOTED = (
    "why is in its log, and in this error's `said`, which may hold unjudged text of the model"
)

_SHORTEST = 6  # characters: "1" or "true" is no secret, and hiding it would garble every message


def secrets_of(headers: Mapping[str, str], key: str | None = None) -> list[str]:
    """What must not stand in an error, longest first: the API key, the values of headers, and of
    `Bearer KEY` the key as well."""
    found = {value.strip() for value in headers.values()}
    for name, value in headers.items():
        scheme, _, rest = value.strip().partition(" ")
        if name.lower().endswith("authorization") or scheme.lower() == "bearer":
            found.add(rest.strip())
    found = {secret for secret in found if len(secret) >= _SHORTEST}
    return sorted({*found, key} if key else found, key=len, reverse=True)


def without_secrets(text: str, secrets: Sequence[str]) -> str:
    """The text on one line, `***` for each of `secrets`, which some servers echo."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return " ".join(text.split())


def retry_after(value: str | None) -> float | None:
    """Seconds, from RFC 9110 section 10.2.3: a number or a date; None where it is neither."""
    try:
        wait = float(value or "")
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, wait) if math.isfinite(wait) else None


class Faults:
    """Makes the UpstreamErrors of one URL. `secrets` never stand in one, even where a server
    echoes them; `timeout` is in seconds."""

    def __init__(self, url: httpx.URL, secrets: Sequence[str], timeout: float) -> None:
        # Without user, password and query: keys are put there too.
        self.where = f"{url.scheme}://{url.netloc.decode()}{url.path}"
        self._secrets = list(secrets)
        self._timeout = timeout

    def error(
        self, message: str, *, status: int | None = None, said: str | None = None
    ) -> UpstreamError:
        """An UpstreamError on one line."""
        return UpstreamError(without_secrets(message, self._secrets), status=status, said=said)

    def refused(self, response: httpx.Response) -> UpstreamError:
        """For a response, already read, whose status is no success."""
        status = response.status_code
        said = self._said(response.text)
        parts = [
            f"{self.where} answered HTTP {status}",
            _CURES.get(status),
            said and (f"it says: {said}" if status < 500 else _UNQUOTED),
        ]
        return self.error("; ".join(part for part in parts if part), status=status, said=said)

    def broken(self, error: Exception) -> UpstreamError:
        """For a connection that failed."""
        kind = type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return self.error(f"{self.where} cannot be reached ({error or kind}): is it running?")
        if isinstance(error, httpx.TimeoutException):
            return self.error(
                f"{self.where} did not answer within {self._timeout:g} s: raise timeout"
            )
        if isinstance(error, SSEError):
            return self.error(f"{self.where} sent no event stream, check the URL: {error}")
        return self.error(f"{self.where} broke off the answer: {kind}: {error}")

    def parse(self, body: str | bytes) -> Any:
        """JSON of a response or an event; raises UpstreamError where it is none, and where it is
        an error object."""
        try:
            data = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self.error(
                f"{self.where} answered with what is not JSON ({_flaw(error)}): check the URL"
            ) from None
        if isinstance(data, dict) and data.get("error"):
            said = self._reported(data["error"])
            raise self.error(f"{self.where} reports an error; {_UNQUOTED}", said=said)
        return data

    def unread(self, what: str, data: object, size: int) -> UpstreamError:
        """For an answer of another shape than `what`. It may be a model's text, which is not
        judged: nothing of it is quoted."""
        kind = type(data).__name__
        return self.error(
            f"{self.where} answered without {what} that holds a text (JSON of type {kind}, "
            f"{size:,} long): does it speak OpenAI's chat API?"
        )

    def _excerpt(self, text: str) -> str:
        """The beginning of what a server said went wrong, fit for an error text."""
        # Before it is cut, for a cut key would not be found.
        text = without_secrets(text, self._secrets)
        return text if len(text) <= 200 else f"{text[:200]}..."

    def _reported(self, error: object) -> str | None:
        """OpenAI's `error.message` where it is there; nothing of what else stands beside it."""
        said = error.get("message") if isinstance(error, dict) else error
        return self._excerpt(said) if isinstance(said, str) else None

    def _said(self, body: str) -> str:
        """What a server that refuses a call says went wrong: OpenAI's `error.message` where it is
        there."""
        try:
            error = json.loads(body)["error"]
            return self._excerpt(str(error["message"] if isinstance(error, dict) else error))
        except (ValueError, KeyError, TypeError, RecursionError):
            return self._excerpt(body)


def _flaw(error: Exception) -> str:
    """What keeps a body from being JSON, without a word of it: it may be a model's text."""
    match error:
        case json.JSONDecodeError():
            where = f"character {error.pos} of {len(error.doc)}"
            return f"{error.msg.partition(':')[0].lower()}, at {where}"
        case UnicodeDecodeError():
            return f"not UTF-8, at byte {error.start}"
        case RecursionError():
            return "nested too deeply"
        case _:
            return "a number is too long"
