"""The guarded client: a subclass, made on the fly, of the client's own class, whose `request` runs
the flows. Sync and async differ in their drivers alone.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any

import httpx
from openai import (
    AsyncAzureOpenAI,
    AsyncOpenAI,
    AsyncStream,
    AzureOpenAI,
    ContentFilterFinishReasonError,
    OpenAI,
    Stream,
)

from guardrail._judging import Judging
from guardrail._openai_chat import CHAT
from guardrail._openai_events import RESPONSES
from guardrail._openai_flow import END, Api, Ask, Flow, Give, T
from guardrail._openai_paths import call_path, check_deployment, is_stored_response, passes
from guardrail.conversation import Check, Close, Pull, Rules
from guardrail.errors import GuardrailError, UpstreamError
from guardrail.guard import Guard

__all__ = ["adrive", "arun", "guarded"]

_RAW = "x-stainless-raw-response"


def guarded(client: Any, guard: Guard, rules: Rules) -> Any:
    """A guarded twin of `client`, which stays as it is. Raises TypeError for what is no client."""
    if isinstance(client, _Guarded):
        raise TypeError("this client is guarded already")
    if not isinstance(client, OpenAI | AsyncOpenAI):
        raise TypeError(
            f"guard_openai needs an OpenAI or AsyncOpenAI client, not {type(client).__name__}"
        )
    kind: Any = type(client)
    cls: Any = _class_for(kind)
    twin = cls.__new__(cls)
    # What the client has made already (its resources) would go on calling the unguarded one.
    made = {n for c in kind.__mro__ for n, v in vars(c).items() if _is_cached(v)}
    twin.__dict__.update({name: v for name, v in client.__dict__.items() if name not in made})
    twin._guardrail = (client, guard, rules)
    return twin


def _is_cached(value: object) -> bool:
    return isinstance(value, functools.cached_property)


@functools.cache
def _class_for(cls: Any) -> type[Any]:
    base = _SyncGuarded if issubclass(cls, OpenAI) else _AsyncGuarded
    return type(f"Guarded{cls.__name__}", (base, cls), {})


class _Guarded:
    _guardrail: tuple[Any, Guard, Rules]

    def copy(self, **options: Any) -> Any:
        """The client's own `copy`, guarded likewise."""
        client, guard, rules = self._guardrail
        return guarded(client.copy(**options), guard, rules)

    with_options = copy

    @property
    def websocket_base_url(self) -> Any:  # every websocket of the client asks for it
        raise GuardrailError(
            "a websocket (realtime, live, responses.connect) cannot be guarded: use "
            "chat.completions.create or responses.create with stream=True"
        )


class _SyncGuarded(_Guarded):
    def request(
        self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        client, guard, rules = self._guardrail
        call = _Call(client, options, stream)
        if call.api is None:
            return client.request(cast_to, options, stream=stream, stream_cls=stream_cls)
        ask: Ask = _run(call.read(rules), guard)
        if not ask.ok:
            if stream:
                return _GuardedStream(iter(call.api.refused_stream(ask)))
            return call.parsed(call.api.refused(ask))
        answer = client.request(cast_to, call.options(ask), stream=stream, stream_cls=stream_cls)
        if stream:
            raw = call.typed(answer, Stream)
            return _GuardedStream(_drive(call.api.stream(ask), guard, raw), raw)
        answer = call.typed(answer, call.api.answer_type)
        return call.parsed(_run(call.api.judge(ask, answer), guard))


class _AsyncGuarded(_Guarded):
    async def request(
        self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        client, guard, rules = self._guardrail
        call = _Call(client, options, stream)
        if call.api is None:
            return await client.request(cast_to, options, stream=stream, stream_cls=stream_cls)
        ask: Ask = await arun(call.read(rules), guard)
        if not ask.ok:
            if stream:
                return _GuardedAsyncStream(_aiter(call.api.refused_stream(ask)))
            return call.parsed(call.api.refused(ask))
        answer = await client.request(
            cast_to, call.options(ask), stream=stream, stream_cls=stream_cls
        )
        if stream:
            raw = call.typed(answer, AsyncStream)
            return _GuardedAsyncStream(adrive(call.api.stream(ask), guard, raw), raw)
        answer = call.typed(answer, call.api.answer_type)
        return call.parsed(await arun(call.api.judge(ask, answer), guard))


class _Call:
    """One call of `request`, in the words of the API it is for. Raises GuardrailError where that
    API cannot be guarded."""

    def __init__(self, client: Any, options: Any, stream: bool) -> None:
        self._options = options
        method = options.method.upper()
        path = call_path(options.url)
        if isinstance(client, AzureOpenAI | AsyncAzureOpenAI):
            for body in (options.json_data, options.extra_json):
                check_deployment(body.get("model") if isinstance(body, Mapping) else None)
        self.api: Api | None = None
        if (method, path) == ("POST", "chat/completions"):
            self.api = CHAT
        elif (method, path) == ("POST", "responses") or is_stored_response(method, path):
            self.api = RESPONSES
        elif not passes(method, path):
            raise GuardrailError(
                f"{method} /{path} is not guarded: use chat.completions.create or "
                "responses.create, or call it on the client that was given to guard_openai"
            )
        if self.api is None:
            return
        headers = options.headers if isinstance(options.headers, Mapping) else {}
        if any(name.lower() == _RAW for name in headers):
            raise _not_judged("a raw response")
        self._body = {**_mapping(options.json_data), **_mapping(options.extra_json)}
        if getattr(options, "content", None) is not None:  # openai 1 has no such option
            raise _not_judged("a body of bytes")
        if method == "POST" and bool(self._body.get("stream")) != stream:
            raise GuardrailError("stream was given in extra_body: pass stream=True instead")
        self._sends = method == "POST" and not path.endswith("/cancel")
        self._parser = options.post_parser if callable(options.post_parser) else None

    def read(self, rules: Rules) -> Judging[Ask]:
        assert self.api is not None
        if not self._sends:  # an answer to what was asked, and judged, before
            return _stored(self._body, rules)
        return self.api.read(self._body, rules)

    def options(self, ask: Ask) -> Any:
        """The options to call the API with: the judged body, and no parser yet."""
        update: dict[str, Any] = {"post_parser": type(self._options)(method="", url="").post_parser}
        if self._sends:
            update |= {"json_data": dict(ask.body), "extra_json": None}
        return self._options.model_copy(update=update)

    def typed(self, answer: Any, kind: type[T]) -> T:
        if isinstance(answer, kind):
            return answer
        if hasattr(answer, "http_response"):  # default headers, too, can ask for a raw response
            raise _not_judged(f"an answer of type {type(answer).__name__}")
        raise UpstreamError(
            f"the API answered with what is no {kind.__name__} (openai reads it as "
            f"{type(answer).__name__}), so that it cannot be judged: check the client's base_url "
            "(it often ends in /v1)"
        )

    def parsed(self, answer: Any) -> Any:
        """What `parse()` makes of a judged answer."""
        if self._parser is None:
            return answer
        details = getattr(answer, "incomplete_details", None)
        if getattr(details, "reason", None) == "content_filter":
            raise ContentFilterFinishReasonError()
        return self._parser(answer)


def _stored(body: Mapping[str, Any], rules: Rules) -> Judging[Ask]:
    yield from ()
    return Ask(body, "", None, True, rules)


def _mapping(body: Any) -> Mapping[str, Any]:
    if body is None:
        return {}
    if not isinstance(body, Mapping):
        raise _not_judged(f"a body of type {type(body).__name__}")
    return body


def _not_judged(what: str) -> GuardrailError:
    return GuardrailError(
        f"{what} cannot be judged: use create() or parse(), or stream=True, without "
        "with_raw_response, with_streaming_response or a body of your own"
    )


# --- drivers -------------------------------------------------------------------------------------


def _run(flow: Judging[T], guard: Guard) -> T:
    answer: Any = None
    while True:
        try:
            step = flow.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        answer = guard.check_many(step.pairs)


async def arun(flow: Judging[T], guard: Guard) -> T:
    answer: Any = None
    while True:
        try:
            step = flow.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        answer = await guard.acheck_many(step.pairs)


def _drive(flow: Flow, guard: Guard, raw: Stream[Any]) -> Generator[Any, None, None]:
    answer: Any = None
    try:
        while True:
            try:
                step = flow.send(answer)
            except StopIteration:
                return
            answer = None
            match step:
                case Check(pairs):
                    answer = guard.check_many(pairs)
                case Pull():
                    answer = next(raw, END)
                case Close():
                    raw.close()
                case Give(item):
                    yield item
    finally:
        raw.close()


async def adrive(flow: Flow, guard: Guard, raw: AsyncStream[Any]) -> AsyncGenerator[Any, None]:
    answer: Any = None
    try:
        while True:
            try:
                step = flow.send(answer)
            except StopIteration:
                return
            answer = None
            match step:
                case Check(pairs):
                    answer = await guard.acheck_many(pairs)
                case Pull():
                    answer = await anext(raw, END)
                case Close():
                    await raw.close()
                case Give(item):
                    yield item
    finally:
        await raw.close()


async def _aiter(items: Any) -> AsyncGenerator[Any, None]:
    for item in items:
        yield item


# Their classes' own constructors start to read a response; here it is read by the driver.
class _GuardedStream(Stream[Any]):
    def __init__(self, items: Any, raw: Stream[Any] | None = None) -> None:
        self._iterator = items
        self.response = raw.response if raw is not None else _no_response()


class _GuardedAsyncStream(AsyncStream[Any]):
    def __init__(self, items: Any, raw: AsyncStream[Any] | None = None) -> None:
        self._iterator = items
        self.response = raw.response if raw is not None else _no_response()


def _no_response() -> Any:
    """What stands where no call was made, so that `close()` has something to close."""
    return httpx.Response(200, content=b"", request=httpx.Request("POST", "http://guardrail"))
