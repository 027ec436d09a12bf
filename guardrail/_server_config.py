"""The settings of `guardrail serve`, and the one TOML file they are read from.

Every error names the key, the line, and the nearest right word. Policies and upstreams that are
named are looked up here, so that a server that starts knows all it was told of.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import PydanticCustomError

from guardrail._onnx import Device
from guardrail._server_keys import HASH, LONGEST_NAME, NAME
from guardrail._server_source import ConfigError, Location, Source, holds
from guardrail._toml import nearest
from guardrail.artifact import is_path
from guardrail.conversation import Rules
from guardrail.errors import PolicyError, UpstreamError
from guardrail.policy import PRESETS, Policy
from guardrail.stream import StreamConfig
from guardrail.upstream import OpenAICompatible

__all__ = ["ConfigError", "Key", "Limits", "Settings", "Upstream", "load_settings"]

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of RFC 9110
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME, pattern=f"^{NAME}$")]


def _bare_host(host: str) -> str:
    """Without the brackets that an IPv6 address has in a URL."""
    bare = host[1:-1] if re.fullmatch(r"\[.*:.*\]", host) else host
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        if not re.fullmatch(r"[^\s:/\[\]]+", host):
            raise PydanticCustomError(
                "host", "should be a name or an address alone (a port goes into port)"
            ) from None
    return bare


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSettings(_Table):
    """The moderator. batching: a queue that keeps every core busy with a text of its own. threads:
    of one text; 1 by default, all cores without batching."""

    name: Name = "small"
    device: Device = "auto"
    threads: Count | None = None
    batching: bool = True


class Limits(_Table):
    """What one worker takes on; beyond, it says so at once (413, 429) instead of slowing down.

    moderations, chats: requests of each kind that are open at a time. inputs: texts of one call;
    texts: of all open moderations together. choices: the largest `n` of a chat.
    body_seconds: until a body is there, however it trickles. request_seconds: one call, its body
    and its upstream included. stream_seconds: one stream, once its body is there.
    shutdown_seconds: what open requests have to finish after SIGTERM.
    """

    body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 1_048_576
    body_seconds: Seconds = 10.0
    inputs: Count = 64
    texts: Count = 512
    choices: Annotated[int, Field(ge=1, le=128)] = 16
    moderations: Count = 96
    chats: Count = 96
    request_seconds: Seconds = 120.0
    stream_seconds: Seconds = 600.0
    keep_alive_seconds: Seconds = 10.0
    retry_after_seconds: Count = 1
    shutdown_seconds: Seconds = 20.0


class Upstream(_Table):
    """A chat API. timeout: seconds for a connection, and between two pieces of an answer.

    api_key_env: the environment variable that holds its key. forward_key: send the caller's own
    key instead, where the server has no keys of its own.
    """

    url: Name
    api_key_env: Name | None = None
    forward_key: bool = False
    timeout: Seconds = 60.0
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    headers: dict[str, str] = {}


class NamedModel(_Table):
    """A model that callers may name; `name` is what its upstream calls it."""

    upstream: Name
    name: Name | None = None


class Key(_Table):
    """A bearer key. policy: its own; policies: those it may ask for by header; models: the only
    ones it may use; expires: its last day (UTC)."""

    name: Name
    hash: Annotated[str, Field(pattern=f"^{HASH}$")]
    policy: Name | None = None
    policies: list[Name] = []
    models: list[Name] = []
    expires: datetime.date | None = None


class LogSettings(_Table):
    """text: log what was judged, too. format auto: JSON, unless stderr is a terminal."""

    format: Literal["auto", "json", "text"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"
    text: bool = False


class AuditSettings(_Table):
    """The audit log, to which all workers append; see `guardrail.audit.AuditLog`. key_file: what
    seals it, by default one beside it. text: write what was judged, too."""

    path: Name
    key_file: Name | None = None
    fsync: Literal["always", "interval", "never"] = "always"
    max_bytes: Annotated[int, Field(ge=4096)] = 64 * 2**20
    text: bool = False


class Settings(_Table):
    """All of it. policies: names for policy files; header_policies: those that a caller without a
    key may ask for; judge_roles all: system, developer and tool messages are no more trusted than
    the user's; models: {} offers every model of the default upstream."""

    host: Annotated[Name, AfterValidator(_bare_host)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    policy: Name = "balanced"
    policies: dict[str, Name] = {}
    header_policies: list[Name] = []
    context_turns: Annotated[int, Field(ge=1, le=64)] = 4
    judge_roles: Literal["user", "all"] = "user"
    allow_anonymous: bool = False
    default_upstream: Name | None = None
    upstreams: dict[str, Upstream] = {}
    models: dict[str, NamedModel] = {}
    keys: list[Key] = []
    model: ModelSettings = ModelSettings()
    limits: Limits = Limits()
    log: LogSettings = LogSettings()
    audit: AuditSettings | None = None

    _source: Source = PrivateAttr(default_factory=Source)

    def error(self, at: Location, message: str) -> ConfigError:
        """What is found wrong at a key later than these were read, as `load_settings` says it."""
        return self._source.error([(at, message)])

    def rules(self, policy: Policy) -> Rules:
        """How a chat is guarded under a policy."""
        return Rules(
            policy,
            StreamConfig(),
            context_turns=self.context_turns,
            every_role=self.judge_roles == "all",
        )

    def policy_source(self, name: str) -> str:
        """The preset or the file that a policy name stands for."""
        return self.policies.get(name, name)

    def policy_names(self) -> list[str]:
        """Every policy that a request may end up under."""
        wanted = [self.policy, *self.policies, *self.header_policies]
        for key in self.keys:
            wanted += [*([key.policy] if key.policy else []), *key.policies]
        return list(dict.fromkeys(wanted))

    def upstream_name(self) -> str | None:
        """Where models go that `models` does not name."""
        if self.default_upstream is None and len(self.upstreams) == 1:
            return next(iter(self.upstreams))
        return self.default_upstream


def load_settings(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Settings of a TOML file, or the defaults, with `overrides` (top-level keys; of a table, its
    own keys) over them. Raises ConfigError with everything that is wrong."""
    path = None if path is None else Path(path)
    source = Source.read(path, overrides or {})
    data = {**source.data}
    for name, value in (overrides or {}).items():
        old = data.get(name)
        both = isinstance(value, Mapping) and isinstance(old, dict)
        data[name] = {**old, **value} if both and isinstance(old, dict) else value
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise source.error(_read_error(data, e["loc"], e) for e in error.errors()) from None
    settings = _with_absolute_paths(settings, path, source)
    settings._source = source
    problems = list(_problems(settings))
    if problems:
        raise source.error(problems)
    return settings


def _with_absolute_paths(settings: Settings, path: Path | None, source: Source) -> Settings:
    folder = Path() if path is None else path.resolve().parent
    named = {n: p if p in PRESETS else str(folder / p) for n, p in settings.policies.items()}
    for name in settings.policy_names():
        given = name == settings.policy and source.is_given(("policy",))  # from where it was typed
        if name not in named and name not in PRESETS and not given and (folder / name).is_file():
            named[name] = str(folder / name)
    update: dict[str, Any] = {"policies": named}
    model = settings.model
    if is_path(model.name) and not source.is_given(("model", "name")):
        update["model"] = model.model_copy(update={"name": str((folder / model.name).absolute())})
    if settings.audit is not None:
        places = {"path": settings.audit.path, "key_file": settings.audit.key_file}
        places = {n: str((folder / p).absolute()) for n, p in places.items() if p is not None}
        update["audit"] = settings.audit.model_copy(update=places)
    return settings.model_copy(update=update)


# --- what only the whole can tell ----------------------------------------------------------------


def _problems(settings: Settings) -> Iterator[tuple[Location, str]]:
    yield from _policy_problems(settings)
    yield from _upstream_problems(settings)
    for what in ("name", "hash"):
        seen: dict[str, int] = {}
        for i, key in enumerate(settings.keys):
            first = seen.setdefault(getattr(key, what), i)
            if first != i:
                yield ("keys", i, what), f"key {first + 1} has the same {what}: use another"
    if settings.limits.inputs > settings.limits.texts:
        yield ("limits", "inputs"), "is more than limits.texts, so that no such call could be taken"
    if not settings.keys and not settings.allow_anonymous and not _is_loopback(settings.host):
        yield (
            ("host",),
            f"{settings.host} can be reached by others and there are no keys: make one with "
            "`guardrail keys new`, or say allow_anonymous = true",
        )


def _policy_problems(settings: Settings) -> Iterator[tuple[Location, str]]:
    tables = [name for name in settings.policies if settings._source.says(("policies", name))]
    used: list[tuple[Location, str]] = [(("policies", name), name) for name in tables]
    used += [(("policy",), settings.policy)]
    used += [(("header_policies", i), p) for i, p in enumerate(settings.header_policies)]
    for i, key in enumerate(settings.keys):
        used += [(("keys", i, "policy"), key.policy)] if key.policy else []
        used += [(("keys", i, "policies", j), p) for j, p in enumerate(key.policies)]
    for at, name in used:
        if at[0] == "policies" and name in PRESETS:
            yield at, f"{name!r} is a preset: give the policy a name of its own"
            continue
        try:
            Policy.load(settings.policy_source(name))
        except PolicyError as error:
            known = [*settings.policies, *PRESETS]
            if at[0] != "policies" and name in tables:
                continue  # told there
            if name in known or Path(name).is_file():
                yield at, str(error)
            else:
                yield at, f"no policy {name!r}{nearest(name, known)} (known: {', '.join(known)})"


def _upstream_problems(settings: Settings) -> Iterator[tuple[Location, str]]:
    known = list(settings.upstreams)
    for name, upstream in settings.upstreams.items():
        if "/" in name:
            yield ("upstreams", name), "a name has no '/': it stands before one in upstream/model"
        try:
            OpenAICompatible(upstream.url, model="")
            yield from _header_problems(name, upstream)
        except UpstreamError as error:
            yield ("upstreams", name, "url"), str(error)
        if upstream.forward_key and settings.keys:
            yield (
                ("upstreams", name, "forward_key"),
                "the callers' keys are this server's own: use api_key_env",
            )
        if upstream.forward_key and upstream.api_key_env:
            yield ("upstreams", name, "forward_key"), "api_key_env is given as well: choose one"
    default = settings.default_upstream
    if default is not None and default not in known:
        yield ("default_upstream",), f"no upstream {default!r}{nearest(default, known)}"
    for name, model in settings.models.items():
        if model.upstream not in known:
            yield (
                ("models", name, "upstream"),
                f"no upstream {model.upstream!r}{nearest(model.upstream, known)}",
            )
    for i, key in enumerate(settings.keys):
        for j, name in enumerate(key.models):
            if settings.models and name not in settings.models:
                found = nearest(name, settings.models)
                yield ("keys", i, "models", j), f"no model {name!r}{found}"


def _header_problems(name: str, upstream: Upstream) -> Iterator[tuple[Location, str]]:
    for header, value in upstream.headers.items():
        at = ("upstreams", name, "headers", header)
        if not _HEADER.fullmatch(header):
            yield at, f"{header!r} is no name of an HTTP header"
        try:
            OpenAICompatible(upstream.url, model="", headers={header: value})
        except UpstreamError as error:
            yield at, str(error)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- errors --------------------------------------------------------------------------------------


_TEXTS = {
    "string_too_short": "is empty",
    "string_too_long": f"is longer than {LONGEST_NAME} characters",
    "string_pattern_mismatch": "holds a line break or another control character",
    "date_type": "is no date: write it without quotes and without a time, as 2030-01-31",
}


def _read_error(data: Mapping[str, Any], at: Location, error: Any) -> tuple[Location, str]:
    kind, found = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return at, f"unknown key{nearest(str(at[-1]), _fields(at[:-1]))}"
    if kind == "missing":
        return at, "is missing"
    if not holds(data, at):  # pydantic names parts of unions, too
        at = at[:-1]
    shown = f", not {found!r}" if isinstance(found, str | int | float | bool) else ""
    expected = error.get("ctx", {}).get("expected", "")
    words = [word for i, word in enumerate(str(expected).split("'")) if i % 2]
    if at[-1:] == ("hash",):
        return at, "is not a hash that `guardrail keys new` made"
    if kind in _TEXTS:
        return at, _TEXTS[kind]
    message = error["msg"].replace("Input should", "should")
    return at, f"{message}{shown}{nearest(str(found), words) if words else ''}"


def _fields(at: Location) -> Sequence[str]:
    """The names of the fields of the table at `at`."""
    tables: dict[Location, type[_Table]] = {
        (): Settings, ("model",): ModelSettings, ("limits",): Limits, ("log",): LogSettings,
        ("audit",): AuditSettings,
    }  # fmt: skip
    groups: dict[Any, type[_Table]] = {"upstreams": Upstream, "models": NamedModel, "keys": Key}
    table = tables.get(at) or groups[at[0]]
    return list(table.model_fields)
