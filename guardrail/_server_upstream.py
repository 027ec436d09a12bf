"""The chat APIs behind `guardrail serve`: which one a model lives on, and the client it is called
with, whose connections are pooled and kept.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import os
import time
from collections.abc import Sequence

from openai import AsyncOpenAI, Omit, OpenAIError

from guardrail._server_config import Settings, Upstream
from guardrail._server_errors import ApiError, upstream_fault
from guardrail.upstream import endpoint
from guardrail.upstream_faults import secrets_of

__all__ = ["Route", "Upstreams"]

_LIST_SECONDS = 30.0  # how long a list of models is believed
_LIST_TIMEOUT = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes. name: of the upstream; model: what that calls it."""

    name: str
    model: str
    upstream: Upstream
    client: AsyncOpenAI
    secret: str | None
    retry_after: int

    def headers(self, token: str | None) -> dict[str, str | Omit]:
        """The key of the caller where it is to be sent on, and no key where there is none."""
        if self.upstream.forward_key and token:
            return {"Authorization": f"Bearer {token}"}
        own = self.secret or any(n.lower() == "authorization" for n in self.upstream.headers)
        return {} if own else {"Authorization": Omit()}

    def fault(self, error: Exception) -> ApiError:
        """What the caller is told of an error of this upstream."""
        return upstream_fault(
            error,
            self.name,
            retry_after=self.retry_after,
            forwarded=self.upstream.forward_key,
            secrets=secrets_of(self.upstream.headers, self.secret),
        )


class Upstreams:
    """The upstreams of one worker. Raises ConfigError when a key's variable is not set."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._default = settings.upstream_name()
        self._secrets = {name: _secret(name, settings) for name in settings.upstreams}
        self._clients = {
            name: _client(upstream, self._secrets[name])
            for name, upstream in settings.upstreams.items()
        }
        self._listed: dict[str, tuple[float, list[str]]] = {}

    def route(self, model: str, allowed: Sequence[str]) -> Route:
        """Where `model` goes: a named model, `upstream/model`, or any model of the default
        upstream where no models are named. Raises ApiError 404, or 403 when it is none of
        `allowed`, where that is not empty."""
        if not self._clients:
            raise ApiError(
                404,
                "this server has no upstream: start it with --upstream URL, or name one under "
                "[upstreams] in its config file",
                code="no_upstream",
            )
        if allowed and model not in allowed:
            raise ApiError(
                403,
                f"this key may not use the model {model!r}, only {', '.join(allowed)}",
                code="model_not_allowed",
                param="model",
            )
        settings = self._settings
        named = settings.models.get(model)
        prefix, _, rest = model.partition("/")
        if named is not None:
            return self._route(named.upstream, named.name or model)
        if not settings.models and rest and prefix in self._clients:
            return self._route(prefix, rest)
        if not settings.models and self._default is not None:
            return self._route(self._default, model)
        known = [*settings.models] or [f"{name}/..." for name in self._clients]
        near = difflib.get_close_matches(model, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f": known are {', '.join(known)}"
        raise ApiError(404, f"no model {model!r}{hint}", code="model_not_found", param="model")

    def _route(self, name: str, model: str) -> Route:
        return Route(
            name,
            model,
            self._settings.upstreams[name],
            self._clients[name],
            self._secrets[name],
            self._settings.limits.retry_after_seconds,
        )

    async def models(self, token: str | None, *, every: bool = False) -> list[tuple[str, str]]:
        """The names that callers may use, and the upstream of each. Where none are configured, the
        upstreams are asked; one that does not answer is left out. every: with both names of a
        model of the default upstream."""
        if self._settings.models:
            return [(name, model.upstream) for name, model in self._settings.models.items()]
        lists = await asyncio.gather(*(self._list(name, token) for name in self._clients))
        found: list[tuple[str, str]] = []
        for name, models in zip(self._clients, lists, strict=True):
            if name == self._default:
                found += [(model, name) for model in models]
            if name != self._default or every:
                found += [(f"{name}/{model}", name) for model in models]
        return found

    async def _list(self, name: str, token: str | None) -> list[str]:
        route = self._route(name, "")
        shared = not route.upstream.forward_key  # else each caller may see other models
        when, models = self._listed.get(name, (0.0, []))
        if shared and time.monotonic() - when < _LIST_SECONDS and models:
            return models
        client = route.client.with_options(max_retries=0, timeout=_LIST_TIMEOUT)
        try:
            page = await client.models.list(extra_headers=route.headers(token))
            found = [str(model.id) for model in page.data or []]
        except (OpenAIError, ValueError, AttributeError, TypeError):
            return models
        if shared:
            self._listed[name] = (time.monotonic(), found)
        return found

    async def aclose(self) -> None:
        for client in self._clients.values():
            await client.close()


def _secret(name: str, settings: Settings) -> str | None:
    variable = settings.upstreams[name].api_key_env
    if variable is None:
        return None
    secret = os.environ.get(variable, "").strip()
    if not secret:
        raise settings.error(
            ("upstreams", name, "api_key_env"),
            f"the environment variable {variable} is not set: put the upstream's API key into it",
        )
    return secret


def _client(upstream: Upstream, secret: str | None) -> AsyncOpenAI:
    base = str(endpoint(upstream.url)).removesuffix("/chat/completions")
    return AsyncOpenAI(
        base_url=base,
        api_key=secret or "none",
        timeout=upstream.timeout,
        max_retries=upstream.retries,
        default_headers=upstream.headers,
    )
