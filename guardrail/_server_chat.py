"""`/v1/chat/completions`: the guarded proxy. The protocol is `_openai_chat`, the very one of
`guard_openai`; here it is driven between a caller and an upstream over HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from openai import AsyncStream
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from guardrail._openai_chat import CHAT
from guardrail._openai_client import adrive, arun
from guardrail._openai_flow import Ask, UnfitError
from guardrail._server_errors import ApiError, Json, json_bytes
from guardrail._server_limits import Disconnected, paced, while_connected
from guardrail._server_metrics import Metrics
from guardrail._server_telemetry import RECORD, Span
from guardrail._server_upstream import Route
from guardrail.conversation import Rules
from guardrail.guard import Guard

__all__ = ["Chat", "EventStream", "check_body"]


def check_body(body: Mapping[str, Any], choices: int) -> None:
    """Raises ApiError on what would be no request, or too large a one."""
    model, n, stream = body.get("model"), body.get("n"), body.get("stream")
    if not isinstance(model, str) or not model:
        raise ApiError(400, "'model' must name a model", param="model")
    if not isinstance(body.get("messages"), list):
        raise ApiError(400, "'messages' must be a list of chat messages", param="messages")
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= choices):
        raise ApiError(400, f"'n' must be a number from 1 to {choices}", param="n")
    if not isinstance(stream, bool | None):
        raise ApiError(400, "'stream' must be true or false", param="stream")
    for name, value in body.items():
        if not _is_sendable([name, value]):
            raise ApiError(
                400,
                "the text holds half of a surrogate pair (a character that was cut in two), or is "
                "nested too deeply, so that it cannot be sent on as JSON: cut texts between "
                "characters",
                param=name,
            )


def _is_sendable(value: Any) -> bool:
    """Whether the upstream's client can encode it. What it cannot is the caller's fault, and not
    replaced: what is sent is to be what was judged, and what was asked."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    """One guarded chat request: what is asked, of whom, under which guard."""

    body: Mapping[str, Any]
    route: Route
    guard: Guard
    rules: Rules
    token: str | None
    metrics: Metrics

    async def complete(self) -> dict[str, Any]:
        """The judged completion, as JSON data. Raises ApiError."""
        ask = await self._ask()
        if not ask.ok:
            return _json(CHAT.refused(ask))
        answer = await self._post(ask, ChatCompletion)
        if not answer.choices:
            raise self._fault(ValueError("no choices"))
        try:
            judged = await arun(CHAT.judge(ask, answer), self.guard)
        except Exception as error:  # an answer of another shape, which no flow can read
            raise self._fault(error) from error
        return _json(judged)

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks that may go out, as JSON data. Raises ApiError, before the first of them or
        between two; closing it closes the upstream."""
        ask = await self._ask()
        if not ask.ok:
            for chunk in CHAT.refused_stream(ask):
                yield _json(chunk)
            return
        raw = await self._post(ask, AsyncStream)
        finished: dict[int, bool] = {}
        async with aclosing(adrive(CHAT.stream(ask), self.guard, raw)) as items:
            while True:
                try:
                    chunk = await anext(items, None)
                    if chunk is None:
                        break
                    for choice in chunk.choices:
                        done = finished.get(choice.index, False)
                        finished[choice.index] = done or choice.finish_reason is not None
                    data = _json(chunk)
                except Exception as error:
                    raise self._fault(error) from error
                yield data
        if not finished or not all(finished.values()):
            raise self._error(
                ApiError(
                    502,
                    f"the upstream {self.route.name!r} "
                    + (
                        "ended the stream before its answer was finished"
                        if finished
                        else "sent no stream of chunks: does it stream at all?"
                    ),
                    code="upstream_cut_short",
                    kind="upstream_error",
                )
            )

    async def _ask(self) -> Ask:
        try:
            return await arun(CHAT.read(self.body, self.rules), self.guard)
        except UnfitError as error:
            raise ApiError(400, str(error), param=error.param) from None
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None

    async def _post(self, ask: Ask, kind: type[Any]) -> Any:
        """The upstream's answer, or stream of chunks. Raises ApiError."""
        route, streamed = self.route, kind is AsyncStream
        call = Span("guardrail.upstream", server__address=route.name, model=route.model)
        started = time.perf_counter()
        try:
            answer = await route.client.post(
                "/chat/completions",
                cast_to=ChatCompletion,
                body={**ask.body, "model": route.model, "stream": streamed},
                options={"headers": {**call.headers(), **route.headers(self.token)}},
                stream=streamed,
                stream_cls=AsyncStream[ChatCompletionChunk] if streamed else None,
            )
            if not isinstance(answer, kind):
                raise TypeError(f"an answer of type {type(answer).__name__}")
        except Exception as error:
            fault = self._fault(error)
            call.fail(str(fault.code))
            raise fault from error
        finally:
            self.metrics.upstream_seconds.labels(route.name).observe(time.perf_counter() - started)
            call.end()
        return answer

    def _fault(self, error: Exception) -> ApiError:
        return self._error(self.route.fault(error))

    def _error(self, fault: ApiError) -> ApiError:
        self.metrics.upstream_errors.labels(self.route.name, str(fault.code)).inc()
        return fault


def _json(model: Any) -> dict[str, Any]:
    data: dict[str, Any] = model.model_dump(mode="json", exclude_unset=True, warnings=False)
    return data


class EventStream(Response):
    """Server-sent events of `items`. Until the first of them nothing is sent, so that an error has
    its status; while there is none, comments keep the connection open. Later errors are events.

    It ends when `cut` is done, or after `most` seconds, with an error event; when the caller goes
    away, `items` is closed.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        items: AsyncGenerator[dict[str, Any], None],
        *,
        keep_alive: float,
        most: float,
        cut: asyncio.Future[None],
        metrics: Metrics,
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # nginx would hold events back
        self._items = items
        self._keep_alive = keep_alive
        self._most = most
        self._cut = cut
        self._metrics = metrics
        self._begun = False
        self._started = time.perf_counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.streams.inc()
        try:
            await while_connected(receive, self._run(scope, receive, send))
        except Disconnected:
            if record := RECORD.get():
                record.error = "client_disconnected"
        finally:
            self._metrics.streams.dec()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._most):
                await self._send_items(send)
            return
        except TimeoutError:
            error = ApiError(
                504,
                f"a stream lasts {self._most:g} s at most",
                code="stream_timeout",
                kind="server_error",
            )
        except ApiError as fault:
            error = fault
        if record := RECORD.get():
            record.error = error.code
        if not self._begun:
            answer = Json(error.body(), error.status, error.headers)
            await answer(scope, receive, send)
            return
        try:
            async with asyncio.timeout(1):
                await self._send(send, _event(error.body()), more=False)
        except TimeoutError:  # a caller that does not read is not waited for
            raise Disconnected from None

    async def _send_items(self, send: Send) -> None:
        async with aclosing(paced(self._items, self._keep_alive, self._cut)) as items:
            async for item in items:
                await self._send(send, b": keep-alive\n\n" if item is None else _event(item))
        await self._send(send, b"data: [DONE]\n\n", more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            self._metrics.first_seconds.observe(time.perf_counter() - self._started)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": data, "more_body": more})


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json_bytes(data) + b"\n\n"
