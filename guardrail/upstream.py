"""A chat model behind an OpenAI-compatible URL: OpenAI, Ollama, vLLM, llama.cpp, LM Studio, ...

    model = OpenAICompatible("http://localhost:11434/v1", model="llama3.2")
    GuardedChat(model).complete("Hello")

API: https://platform.openai.com/docs/api-reference/chat. Retries end with the first byte of an
answer: what was begun is never asked again.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import httpx
from httpx_sse import EventSource, ServerSentEvent, SSEError

from guardrail._forks import renewed_in_children
from guardrail.chat_model import Message, Reply, finish_reason
from guardrail.errors import UpstreamError
from guardrail.upstream_faults import Faults, retry_after, secrets_of

__all__ = ["OpenAICompatible"]

_RETRIED = {429, 502, 503, 504}
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.RemoteProtocolError)
_LONGEST_WAIT = 30.0  # seconds
_TEXT_PARTS = ("text", "output_text")


class OpenAICompatible:
    """A `ChatModel` over HTTP, sync and async.

    url: the API's base, with or without `/v1` or `/chat/completions`.
    timeout: seconds to wait for a connection, and between two pieces of an answer.
    retries: how often 429 (its Retry-After is kept to), 502, 503, 504 and connections that fail
        are tried again, with exponential backoff.
    headers: sent with every request, beside the API key.
    options: more keys of the request body (`temperature`, `max_tokens`, ...).
    transport: an httpx transport instead of the network.

    Raises UpstreamError, here when the URL or the key cannot be used, later when a call fails; no
    error text holds the key. `close()`/`aclose()` (or `with`/`async with`) frees the connections.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        api_key: str | None = None,
        timeout: float = 60,
        retries: int = 2,
        headers: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        transport: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = endpoint(url)
        self._model = model
        self._retries = retries
        self._timeout = timeout
        self._options = dict(options or {})
        self._transport = transport
        self._headers = dict(headers or {})
        if api_key and api_key.strip():
            self._headers["Authorization"] = f"Bearer {api_key.strip()}"
        for name, value in self._headers.items():
            if not (value.isascii() and value.isprintable()):
                what = "the API key" if name == "Authorization" else f"the header {name!r}"
                raise UpstreamError(f"{what} holds characters that no HTTP header can carry")
        secrets = secrets_of(headers or {}, api_key and api_key.strip())
        self._faults = Faults(self._url, secrets, timeout)
        self._forked = False
        self._disconnect()
        renewed_in_children(self)

    def _disconnect(self) -> None:
        self._lock = threading.Lock()
        self._sync_client: httpx.Client | None = None
        # Connections are of the event loop that made them.
        self._async_clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}

    def _after_fork(self) -> None:
        """Connect anew: on the parent's connections a child would read another child's answer."""
        self._forked = True
        self._disconnect()

    def complete(self, messages: Sequence[Message]) -> Reply:
        """The whole answer, in one response."""
        response = self._open(messages, stream=False)
        try:
            return self._answer(response.read())
        except httpx.HTTPError as error:
            raise self._faults.broken(error) from error
        finally:
            response.close()

    def stream(self, messages: Sequence[Message]) -> Iterator[Reply]:
        """The answer in pieces; closing the iterator closes the connection."""
        response = self._open(messages, stream=True)
        events = _Events(self._faults)
        try:
            if _is_json(response):  # some servers do not know of streams
                yield self._answer(response.read())
                return
            for event in _event_source(response).iter_sse():
                if (reply := events.read(event)) is not None:
                    yield reply
                if events.done:
                    return
            events.check_ended()
        except (httpx.HTTPError, SSEError) as error:
            raise self._faults.broken(error) from error
        finally:
            response.close()

    async def acomplete(self, messages: Sequence[Message]) -> Reply:
        """`complete`, async."""
        response = await self._aopen(messages, stream=False)
        try:
            return self._answer(await response.aread())
        except httpx.HTTPError as error:
            raise self._faults.broken(error) from error
        finally:
            await response.aclose()

    async def astream(self, messages: Sequence[Message]) -> AsyncIterator[Reply]:
        """`stream`, async."""
        response = await self._aopen(messages, stream=True)
        events = _Events(self._faults)
        try:
            if _is_json(response):
                yield self._answer(await response.aread())
                return
            async for event in _event_source(response).aiter_sse():
                if (reply := events.read(event)) is not None:
                    yield reply
                if events.done:
                    return
            events.check_ended()
        except (httpx.HTTPError, SSEError) as error:
            raise self._faults.broken(error) from error
        finally:
            await response.aclose()

    # --- opening: two drivers of `_again` ---------------------------------------------------------

    def _open(self, messages: Sequence[Message], *, stream: bool) -> httpx.Response:
        client = self._client()
        attempt = 0
        while True:
            try:
                response = client.send(self._request(client, messages, stream), stream=True)
                if response.is_success:
                    return response
                try:
                    response.read()
                finally:
                    response.close()
                wait = self._again(attempt, response)
            except httpx.HTTPError as error:
                wait = self._again(attempt, error)
            time.sleep(wait)
            attempt += 1

    async def _aopen(self, messages: Sequence[Message], *, stream: bool) -> httpx.Response:
        client = self._async_client()
        attempt = 0
        while True:
            try:
                response = await client.send(self._request(client, messages, stream), stream=True)
                if response.is_success:
                    return response
                try:
                    await response.aread()
                finally:
                    await response.aclose()
                wait = self._again(attempt, response)
            except httpx.HTTPError as error:
                wait = self._again(attempt, error)
            await asyncio.sleep(wait)
            attempt += 1

    def _request(
        self, client: httpx.Client | httpx.AsyncClient, messages: Sequence[Message], stream: bool
    ) -> httpx.Request:
        body = {
            **self._options,
            "model": self._model,
            "messages": [dict(message) for message in messages],
            "stream": stream,
        }
        accept = "text/event-stream" if stream else "application/json"
        return client.build_request(
            "POST", self._url, json=body, headers={"Accept": accept, **self._headers}
        )

    def _again(self, attempt: int, failure: httpx.Response | httpx.HTTPError) -> float:
        """Seconds to wait before the next attempt; raises UpstreamError when there is none."""
        wait = min(_LONGEST_WAIT, 0.5 * 2.0**attempt) * random.uniform(0.5, 1.0)
        if isinstance(failure, httpx.Response):
            wanted = retry_after(failure.headers.get("retry-after"))
            retried = failure.status_code in _RETRIED and (wanted or 0) <= _LONGEST_WAIT
            if not retried or attempt >= self._retries:
                raise self._faults.refused(failure)
            return wait if wanted is None else wanted
        if attempt >= self._retries or not isinstance(failure, _UNSENT):
            raise self._faults.broken(failure) from failure
        return wait

    def _answer(self, body: bytes) -> Reply:
        data = self._faults.parse(body)
        try:
            choice = data["choices"][0]
            ended = finish_reason(choice.get("finish_reason"))
            return Reply(_content(choice["message"]), ended or "stop")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._faults.unread("choices[0].message", data, len(body)) from None

    # --- connections ------------------------------------------------------------------------------

    def _client(self) -> httpx.Client:
        with self._lock:
            if self._sync_client is None:
                transport = self._own_transport()
                if transport is not None and not isinstance(transport, httpx.BaseTransport):
                    raise UpstreamError("this transport is async: call the async methods")
                self._sync_client = httpx.Client(timeout=self._timeout, transport=transport)
            return self._sync_client

    def _async_client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            client = self._async_clients.get(loop)
            if client is None:
                transport = self._own_transport()
                if transport is not None and not isinstance(transport, httpx.AsyncBaseTransport):
                    raise UpstreamError("this transport is sync: call the sync methods")
                client = httpx.AsyncClient(timeout=self._timeout, transport=transport)
                # Without those of closed loops, whose sockets nothing else would let go.
                kept = {own: c for own, c in self._async_clients.items() if not own.is_closed()}
                self._async_clients = kept | {loop: client}
            return client

    def _own_transport(self) -> httpx.BaseTransport | httpx.AsyncBaseTransport | None:
        transport = self._transport
        if self._forked and isinstance(transport, httpx.HTTPTransport | httpx.AsyncHTTPTransport):
            raise UpstreamError(
                "this transport was made before the process was forked, and shares its connections "
                "with the parent: make it, and the OpenAICompatible, in the child"
            )
        return transport

    def close(self) -> None:
        """Close the connections of the sync methods."""
        if self._sync_client is not None:
            self._sync_client.close()
            self._sync_client = None

    async def aclose(self) -> None:
        """Close the connections that the async methods made in this event loop."""
        client = self._async_clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def __enter__(self) -> OpenAICompatible:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> OpenAICompatible:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _event_source(response: httpx.Response) -> EventSource:
    # Event streams are UTF-8, whatever their header says: WHATWG HTML, 9.2.5.
    response.encoding = "utf-8"
    return EventSource(response)


class _Events:
    """Reads the events of one stream; the same for sync and async."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._finished = False
        self.done = False

    def read(self, event: ServerSentEvent) -> Reply | None:
        """The piece an event holds, if it holds one."""
        if event.data.strip() == "[DONE]":
            self.done = True
            return None
        if not event.data:
            return None
        data = self._faults.parse(event.data)
        choices = data.get("choices") if isinstance(data, dict) else None
        if not choices:  # a usage report, a keep-alive
            return None
        try:
            choice = choices[0]
            if choice.get("index", 0) != 0:
                return None
            ended = finish_reason(choice.get("finish_reason"))
            reply = Reply(_content(choice.get("delta") or {}), ended)
        except (KeyError, TypeError, AttributeError):
            raise self._faults.unread("choices[0].delta", data, len(event.data)) from None
        self._finished = self._finished or reply.finish_reason is not None
        return reply

    def check_ended(self) -> None:
        """Raises UpstreamError when the stream ended without saying so: the answer is not whole."""
        if not self._finished:
            raise self._faults.error(
                "the chat model ended the stream before its answer was finished"
            )


def endpoint(url: str) -> httpx.URL:
    """Where chats go, of an API's base. Raises UpstreamError."""
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise UpstreamError(f"{url!r} is not a URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UpstreamError(f"{url!r} is not an http:// or https:// URL")
    if parsed.port is not None and not 1 <= parsed.port <= 65_535:
        raise UpstreamError(f"{parsed.port} is no port: use 1 to 65535")
    path = parsed.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return parsed.copy_with(path=path)


def _is_json(response: httpx.Response) -> bool:
    return str(response.headers.get("content-type", "")).startswith("application/json")


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or message.get("refusal") or ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(part["type"] in _TEXT_PARTS for part in parts):
        raise TypeError("a part of the content is not a text")
    return "".join(part["text"] for part in parts)
