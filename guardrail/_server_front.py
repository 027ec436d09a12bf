"""Around every request of `guardrail serve`: its id, slot, span, metrics and log line, and the last
place of errors, all of which are answered in OpenAI's shape.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guardrail._server_errors import ApiError, Json
from guardrail._server_limits import Admission, Disconnected, stopping
from guardrail._server_metrics import Metrics
from guardrail._server_telemetry import RECORD, Record, Span, log_request, trace_headers

__all__ = ["Front", "answer_api_error", "answer_http_error"]

logger = logging.getLogger("guardrail.server")


class Served(Protocol):
    """What it has to know of the service."""

    metrics: Metrics
    admissions: dict[str, Admission]
    draining: bool
    keep_text: bool


class Front:
    """Around every request: its id, slot, span, metrics and log line; the last place of errors."""

    def __init__(self, app: ASGIApp, service: Served) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service = self._service
        record = Record(_request_id(scope), scope["method"], scope["path"], service.keep_text)
        RECORD.set(record)
        route = _route(_path(scope))
        started = time.perf_counter()
        status = 499  # until there is an answer: the caller left before

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                id_header = (b"x-request-id", record.id.encode())
                message = {**message, "headers": [*message["headers"], id_header]}
            await send(message)

        one = Span(
            f"{scope['method']} {route}",
            trace_headers(scope["headers"]),
            http__request__method=scope["method"],
            http__route=route,
        )
        opened = service.metrics.open.labels(route)
        opened.inc()
        try:
            with one.current():
                await self._admitted(scope, receive, answer)
        except Disconnected:
            record.error = "client_disconnected"
        except Exception as error:
            logger.exception("a request failed", extra={"facts": {"id": record.id}})
            record.error = type(error).__name__
            one.fail(record.error)
            if status != 499:
                raise  # the answer has begun: the server can only break it off
            fault = ApiError(
                500, f"internal error (request {record.id})", code="internal", kind="server_error"
            )
            await Json(fault.body(), 500)(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - started
            opened.dec()
            service.metrics.requests.labels(route, str(status)).inc()
            service.metrics.seconds.labels(route).observe(seconds)
            one.note(http__response__status_code=status, guardrail__request=record.id)
            one.end()
            log_request(record, status, seconds)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        admission = self._service.admissions.get(_path(scope))
        if admission is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            if self._service.draining:
                raise stopping()
            with admission.slot():
                await self._app(scope, receive, send)
        except ApiError as error:
            await Json(error.body(), error.status, error.headers)(scope, receive, send)
            if record := RECORD.get():
                record.error = error.code


def _request_id(scope: Scope) -> str:
    """The caller's own id where it is a sane one, so that logs can be joined."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and re.fullmatch(rb"[\w.-]{1,128}", value):
            return str(value.decode())
    return f"req_{uuid.uuid4().hex}"


def _path(scope: Scope) -> str:
    """The path that routes go by: without that of an app, or a proxy, which this one is below."""
    root, path = scope.get("root_path", "").rstrip("/"), str(scope["path"])
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


_ROUTES = {
    "/v1/moderations", "/v1/chat/completions", "/v1/models", "/healthz", "/readyz", "/metrics",
}  # fmt: skip


def _route(path: str) -> str:
    """A label of few values, whatever is asked for."""
    return path if path in _ROUTES else "/v1/models/*" if path.startswith("/v1/models/") else "*"


async def answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if record := RECORD.get():
        record.error = error.code or str(error.status)
    return Json(error.body(), error.status, error.headers)


async def answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = ", ".join(sorted(_ROUTES))
    what = {
        404: f"no such path: {request.url.path} (this server has {known})",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    fault = ApiError(error.status_code, what, code="unknown_url", headers=error.headers)
    return await answer_api_error(request, fault)
