"""How much `guardrail serve` takes on: open requests, bodies, time. Beyond, it says so at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from guardrail._server_errors import ApiError

__all__ = ["Admission", "Disconnected", "paced", "read_json", "stopping", "while_connected"]

T = TypeVar("T")
_LINGER_SECONDS = 2.0


class Disconnected(Exception):  # noqa: N818 - a fact, not a fault
    """The caller is gone: nobody is there to be answered."""


class Admission:
    """Lets `most` of something in at a time, and tells all others to come back later.

    retry_after: seconds that they are told, asked for anew each time.
    """

    def __init__(self, what: str, most: int, retry_after: Callable[[], int]) -> None:
        self._what = what
        self._most = most
        self._retry_after = retry_after
        self.open = 0

    @contextlib.contextmanager
    def slot(self, count: int = 1) -> Iterator[None]:
        """Raises ApiError 429 when there is no room for `count` more. Waits for nothing."""
        if self.open + count > self._most:
            wait = self._retry_after()
            raise ApiError(
                429,
                f"{self._what}: {self.open} are open, and this server takes {self._most} at most: "
                f"try again in {wait} s",
                code="rate_limit_exceeded",
                kind="requests",
                headers={"Retry-After": str(wait)},
            )
        self.open += count
        try:
            yield
        finally:
            self.open -= count


def stopping() -> ApiError:
    """What is said to those who are still there when the time to shut down is up."""
    return ApiError(
        503,
        "the server is shutting down: ask again",
        code="shutting_down",
        kind="server_error",
        headers={"Retry-After": "1", "Connection": "close"},
    )


async def read_json(request: Request, most: int, seconds: float) -> dict[str, Any]:
    """The JSON object in the body of a request. Raises ApiError: 413 over `most` bytes, chunked
    bodies included; 408 when it takes longer than `seconds`; 400 when it is no JSON object."""
    try:
        async with asyncio.timeout(seconds):
            body, more = await _read(request, most)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {seconds:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    if body is None:
        if more:
            await _linger(request.receive)
        raise ApiError(
            413,
            f"the body is larger than {most:,} bytes: send less, or raise limits.body_bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )
    try:
        data = json.loads(body, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        named = isinstance(error, json.JSONDecodeError | _NoNumberError)
        what = str(error) if named else type(error).__name__
        if isinstance(error, UnicodeDecodeError):
            what = "it is not UTF-8, or compressed, which this server does not read"
        raise ApiError(400, f"the body is not valid JSON: {what}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return data


class _NoNumberError(ValueError):
    """A number that JSON does not have, or that cannot be held."""


def _no_number(text: str) -> float:
    raise _NoNumberError(f"{text} is no number that JSON has")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _NoNumberError(f"the number {text[:40]} is too large")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python reads none of thousands of digits
        said = f"the number {text[:40]}... of {len(text):,} digits is too long"
        raise _NoNumberError(said) from None


async def _read(request: Request, most: int) -> tuple[bytes | None, bool]:
    """The body, None where it is too large, and whether more of it is to come."""
    # A length that is announced and too long is not waited for; uvicorn checks that it is kept.
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        return None, True
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] != "http.request":
            raise Disconnected
        body += message.get("body", b"")
        more = bool(message.get("more_body"))
        if len(body) > most:
            return None, more
        if not more:
            return bytes(body), False


async def _linger(receive: Receive) -> None:
    """Throw away what a caller is still sending, for a while: closed at once, the connection would
    be reset before the caller has read the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while (message := await receive())["type"] == "http.request":
                if not message.get("more_body"):
                    return


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, T], cut: asyncio.Future[None] | None = None
) -> T:
    """What `work` gives. It is cancelled when the caller goes away (raises Disconnected) or `cut`
    is done (raises `stopping()`). The body must have been read."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    ends: set[asyncio.Future[Any]] = {task, gone} if cut is None else {task, gone, cut}
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected if gone.done() else stopping()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def paced(
    items: AsyncIterator[T], seconds: float, cut: asyncio.Future[None]
) -> AsyncGenerator[T | None, None]:
    """Each of `items`, and None whenever `seconds` went by without one. Raises `stopping()` when
    `cut` is done. Closes `items`, whatever happens."""
    coming: asyncio.Future[tuple[bool, Any]] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(_next(items))
            while not coming.done():
                ends: set[asyncio.Future[Any]] = {coming, cut}
                done, _ = await asyncio.wait(
                    ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if cut.done() and not coming.done():
                    raise stopping()
                if not done:
                    yield None
            there, item = coming.result()
            if not there:
                return
            yield item
    finally:
        if coming is not None and not coming.done():
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        if (aclose := getattr(items, "aclose", None)) is not None:
            await aclose()


async def _next(items: AsyncIterator[T]) -> tuple[bool, T | None]:
    try:
        return True, await anext(items)
    except StopAsyncIteration:
        return False, None
