"""`guardrail serve`: an OpenAI-compatible endpoint that moderates, and guards chat models.

    create_app(load_settings(Path("guardrail.toml")))      # for any ASGI server
    serve(settings)                                        # uvicorn, with workers

Routes: `/v1/moderations`, `/v1/chat/completions`, `/v1/models`, `/healthz`, `/readyz`, `/metrics`.
Here are the app and its life; what it answers is in the `_server_*` modules.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import math
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from guardrail._server_address import check_address, resolve
from guardrail._server_chat import Chat, EventStream, check_body
from guardrail._server_config import ConfigError, Key, Settings, load_settings
from guardrail._server_errors import ApiError, Json
from guardrail._server_front import Front, answer_api_error, answer_http_error
from guardrail._server_guard import (
    ServedGuard,
    check_audit,
    check_moderator,
    device_of,
    open_audit,
    open_moderator,
)
from guardrail._server_keys import find_key
from guardrail._server_limits import Admission, read_json, stopping, while_connected
from guardrail._server_metrics import CONTENT_TYPE, Metrics
from guardrail._server_moderations import moderation_answer, read_inputs
from guardrail._server_telemetry import RECORD, setup_logging
from guardrail._server_upstream import Upstreams
from guardrail.batching import Batcher
from guardrail.errors import GuardrailError
from guardrail.guard import Guard
from guardrail.moderator import Moderator
from guardrail.policy import Policy
from guardrail.verdict import Action, Pair

__all__ = ["check", "create_app", "load_settings", "serve"]

logger = logging.getLogger("guardrail.server")
_SETTINGS = "GUARDRAIL_SERVER_SETTINGS"
_POLICY_HEADER = "x-guardrail-policy"


def create_app(settings: Settings | None = None, *, moderator: Moderator | None = None) -> FastAPI:
    """The app. moderator: judges instead of the model that the settings name.

    Raises ConfigError, ArtifactError, PolicyError, MissingExtra.
    """
    service = Service(settings or load_settings(), moderator)
    app = FastAPI(
        title="guardrail",
        openapi_url=None,
        redirect_slashes=False,  # no API client follows one with its body
        lifespan=service.lifespan,
        exception_handlers={ApiError: answer_api_error, HTTPException: answer_http_error},
    )
    app.state.service = service
    app.add_middleware(Front, service=service)
    app.add_api_route("/v1/moderations", service.moderations, methods=["POST"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    app.add_api_route("/v1/models", service.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", service.one_model, methods=["GET"])
    app.add_api_route("/healthz", service.health, methods=["GET", "HEAD"])
    app.add_api_route("/readyz", service.ready, methods=["GET", "HEAD"])
    app.add_api_route("/metrics", service.expose, methods=["GET"])
    return app


class Service:
    """What the requests of one worker share: the moderator, a guard per policy, the upstreams, the
    slots. Its endpoints raise ApiError, and Disconnected."""

    def __init__(self, settings: Settings, moderator: Moderator | None = None) -> None:
        self.settings = settings
        self.keep_text = settings.log.text
        limits = settings.limits
        self.metrics = Metrics()
        self.upstreams = Upstreams(settings)
        policies = {n: Policy.load(settings.policy_source(n)) for n in settings.policy_names()}
        self.moderator = open_moderator(settings, moderator)
        audit = open_audit(settings)
        self.guards = {
            name: ServedGuard(self.metrics, self.moderator, policy, audit=audit)
            for name, policy in policies.items()
        }
        self.admissions = {
            "/v1/moderations": Admission("moderations", limits.moderations, self._retry_after),
            "/v1/chat/completions": Admission("chats", limits.chats, self._retry_after),
        }
        self.texts = Admission("texts to judge", limits.texts, self._retry_after)
        self.ready_since: float | None = None
        self.draining = False
        self.cut: asyncio.Future[None] | None = None

    # --- life -------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        self.cut = loop.create_future()
        _before_signals(lambda: loop.call_soon_threadsafe(self.drain))
        await self._warm_up()
        try:
            yield
        finally:
            self.drain()
            await self.upstreams.aclose()
            if isinstance(self.moderator, Batcher):
                await asyncio.to_thread(self.moderator.close, 1.0)

    async def _warm_up(self) -> None:
        """Ready is who has judged a text. The first one takes longest: no caller waits for it."""
        try:
            await asyncio.to_thread(self.moderator.assess, [Pair("Hello")])
        except Exception as error:  # of any moderator; /readyz tries again
            logger.error("the moderator fails, so this server is not ready: %s", error)
        else:
            self.ready_since = time.time()

    def drain(self) -> None:
        """Take nothing new. What is open has `shutdown_seconds`, and is then ended with an error,
        a moment before uvicorn would break it off."""
        if self.draining or self.cut is None:
            return
        self.draining = True
        loop, cut = self.cut.get_loop(), self.cut
        loop.call_later(self.settings.limits.shutdown_seconds, _finish, cut)

    def _retry_after(self) -> int:
        expected = self.moderator.retry_after if isinstance(self.moderator, Batcher) else 0.0
        return max(self.settings.limits.retry_after_seconds, math.ceil(expected))

    # --- who asks ---------------------------------------------------------------------------------

    def caller(self, request: Request) -> tuple[Key | None, str | None]:
        """The key of a request, None where the server has none, and the token it came with."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else ""
        if not self.settings.keys:
            return None, given or None
        today = datetime.datetime.now(datetime.UTC).date()
        key = find_key(given, self.settings.keys, today) if given else None
        if key is None:
            what = "this API key is not valid, or has expired" if given else "no API key was given"
            raise ApiError(
                401,
                f"{what}: send one as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if record := RECORD.get():
            record.key = key.name
        return key, given

    def guard(self, request: Request, key: Key | None) -> Guard:
        """The guard of the key's policy, or of the one that the header names where it may."""
        settings = self.settings
        name = (key.policy if key else None) or settings.policy
        asked = request.headers.get(_POLICY_HEADER)
        if asked is not None and asked != name:
            allowed = key.policies if key else settings.header_policies
            if asked not in allowed:
                may = f"only {', '.join(allowed)}" if allowed else "none"
                raise ApiError(
                    403,
                    f"this caller may not choose the policy {asked!r} by header: {may}",
                    code="policy_not_allowed",
                    param=_POLICY_HEADER,
                )
            name = asked
        guard = self.guards[name]
        if record := RECORD.get():
            record.policy = guard.policy.id
        return guard

    # --- endpoints --------------------------------------------------------------------------------

    async def moderations(self, request: Request) -> Response:
        key, _ = self.caller(request)
        guard = self.guard(request, key)
        limits = self.settings.limits
        body = await self._body(request)
        pairs = read_inputs(body, limits.inputs)
        with self.texts.slot(len(pairs)):
            verdicts = await self._within(request, guard.acheck_many(pairs))
        return Json(moderation_answer(verdicts, self.moderator.id))

    async def chat(self, request: Request) -> Response:
        key, token = self.caller(request)
        guard = self.guard(request, key)
        limits = self.settings.limits
        body = await self._body(request)
        check_body(body, limits.choices)
        route = self.upstreams.route(body["model"], key.models if key else ())
        if record := RECORD.get():
            record.model, record.upstream = body["model"], route.name
        rules = self.settings.rules(guard.policy)
        chat = Chat(body, route, guard, rules, token, self.metrics)
        if not body.get("stream"):
            return Json(await self._within(request, chat.complete()))
        if self.cut is None:  # mounted in another app, which runs no lifespan of this one
            self.cut = asyncio.get_running_loop().create_future()
        return EventStream(
            chat.stream(),
            keep_alive=limits.keep_alive_seconds,
            most=limits.stream_seconds,
            cut=self.cut,
            metrics=self.metrics,
        )

    async def _body(self, request: Request) -> dict[str, Any]:
        """The call's body, with which its time begins."""
        limits = self.settings.limits
        request.state.ends = asyncio.get_running_loop().time() + limits.request_seconds
        seconds = min(limits.body_seconds, limits.request_seconds)
        return await read_json(request, limits.body_bytes, seconds)

    async def _within(self, request: Request, work: Any) -> Any:
        seconds = self.settings.limits.request_seconds
        try:
            async with asyncio.timeout_at(request.state.ends):
                return await while_connected(request.receive, work, self.cut)
        except TimeoutError:
            raise ApiError(
                504,
                f"no answer within {seconds:g} s",
                code="request_timeout",
                kind="server_error",
            ) from None

    async def list_models(self, request: Request) -> Response:
        return Json({"object": "list", "data": await self._models(request)})

    async def one_model(self, request: Request) -> Response:
        wanted = request.path_params["model"]
        for model in await self._models(request, every=True):
            if model["id"] == wanted:
                return Json(model)
        raise ApiError(404, f"no model {wanted!r}", code="model_not_found", param="model")

    async def _models(self, request: Request, *, every: bool = False) -> list[dict[str, Any]]:
        key, token = self.caller(request)
        allowed = key.models if key else []
        created = int(self.ready_since or 0)
        found = await self.upstreams.models(token, every=every)
        names = [(name, owner) for name, owner in found if not allowed or name in allowed]
        return [
            {"id": name, "object": "model", "created": created, "owned_by": owner}
            for name, owner in [*names, (self.moderator.id, "guardrail")]
        ]

    async def health(self) -> Response:
        guards = self.guards.values()
        return Json(
            {
                "status": "draining" if self.draining else "ok",
                "model": self.moderator.id,
                "device": device_of(self.moderator),
                "policies": {g.policy.id: {"on_error": g.policy.on_error.value} for g in guards},
                "fails_open": sorted(
                    {g.policy.id for g in guards if g.policy.on_error <= Action.FLAG}
                ),
                "upstreams": sorted(self.settings.upstreams),
                "worker": os.getpid(),
            }
        )

    async def ready(self) -> Response:
        if self.draining:
            raise stopping()
        if self.ready_since is None:
            await self._warm_up()
        if self.ready_since is None:
            raise ApiError(
                503, "the moderator fails: see the log", code="not_ready", kind="server_error"
            )
        return Json({"status": "ready"})

    async def expose(self) -> Response:
        return Response(self.metrics.exposition(), media_type=CONTENT_TYPE)


def _finish(cut: asyncio.Future[None]) -> None:
    if not cut.done():
        cut.set_result(None)


def _before_signals(act: Callable[[], object]) -> None:
    """Run `act` before what is done on SIGTERM and SIGINT: servers tell an app of a shutdown only
    when its requests have ended. In the main thread alone there are signals."""
    for number in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(number)
        if not callable(handler):
            continue

        def both(sig: int, frame: Any, then: Callable[..., Any] = handler) -> None:
            act()
            then(sig, frame)

        with contextlib.suppress(ValueError):
            signal.signal(number, both)


# --- serving -------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raises ConfigError with all that `serve` would fail on, but that the port is taken. Starts no
    audit log, asks no upstream."""
    problems: list[str] = []
    for part in (
        lambda: Upstreams(settings),
        lambda: check_moderator(settings),
        lambda: check_audit(settings),
        lambda: resolve(settings),
    ):
        try:
            part()
        except GuardrailError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError where the address cannot be had, and what
    `create_app` raises."""
    check_address(settings)
    setup_logging(settings.log.format, settings.log.level)
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": int(settings.limits.shutdown_seconds) + 3,
        "backlog": 4096,
        # A busy machine takes longer than uvicorn's 5 s to start a worker, which would be killed.
        "timeout_worker_healthcheck": 60,
    }
    # uvicorn ends well, and then sends itself the signal again: that is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app = create_app(settings)  # whatever is wrong with the settings is found here
    if settings.workers == 1:
        uvicorn.run(app, **options)
        return
    del app
    with tempfile.TemporaryDirectory(prefix="guardrail-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        # In a file, for a variable holds 128 KiB at most: some 800 keys.
        left = Path(folder, "settings.json")
        left.write_text(settings.model_dump_json(), encoding="utf-8")
        os.environ[_SETTINGS] = str(left)
        uvicorn.run(
            "guardrail.server:worker_app", factory=True, workers=settings.workers, **options
        )


def worker_app() -> FastAPI:
    """The app of one of several workers, from the settings that `serve` left for it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settings = Settings.model_validate_json(Path(os.environ[_SETTINGS]).read_bytes())
    setup_logging(settings.log.format, settings.log.level)
    return create_app(settings)


def _end_with_parent() -> None:
    """A worker whose supervisor was killed would keep the port for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
