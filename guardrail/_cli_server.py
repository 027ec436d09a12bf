"""`guardrail serve` and `guardrail keys new`. The server itself is imported when it is started."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from guardrail._cli import Device, UsageError
from guardrail._paths import no_place
from guardrail.errors import GuardrailError

try:
    import fcntl
except ModuleNotFoundError:  # Windows: there two processes may lose one another's entries
    fcntl = None  # type: ignore[assignment]

__all__ = ["keys_app", "serve"]

keys_app = typer.Typer(help="API keys for `guardrail serve`.")


@keys_app.callback()
def _keys() -> None:
    pass  # makes `new` a subcommand though it is the only one


def serve(
    config: Annotated[
        Path | None, typer.Option("--config", help="A TOML file; the options here go over it.")
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible API whose chats are guarded.")
    ] = None,
    upstream_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds its API key.")
    ] = None,
    forward_key: Annotated[
        bool, typer.Option("--forward-key", help="Send the caller's own key to the upstream.")
    ] = False,
    policy: Annotated[
        str | None, typer.Option("--policy", help="A preset or a TOML file; by default balanced.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The moderator's name, or its folder.")
    ] = None,
    device: Annotated[
        Device | None, typer.Option("--device", help="auto, cpu, cuda, tensorrt.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="By default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="By default 8000; 0 takes a free one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes, each with its model.")] = None,
    log: Annotated[
        Literal["auto", "json", "text"] | None, typer.Option(help="How log lines look.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether the settings are right.")
    ] = False,
) -> None:
    """Serve /v1/moderations and a guarded /v1/chat/completions to any OpenAI client."""
    _need_extra()
    from guardrail._server_config import ConfigError, load_settings

    if upstream is None and (upstream_key_env is not None or forward_key):
        raise UsageError("--upstream-key-env and --forward-key are of --upstream: give it as well")
    given: dict[str, Any] = {"policy": policy, "host": host, "port": port, "workers": workers}
    overrides = {name: value for name, value in given.items() if value is not None}
    if upstream is not None:
        one = {"url": upstream, "forward_key": forward_key}
        if upstream_key_env is not None:
            one["api_key_env"] = upstream_key_env
        overrides |= {"upstreams": {"default": one}, "default_upstream": "default"}
    named = {"name": model, "device": device}
    if moderator := {name: value for name, value in named.items() if value is not None}:
        overrides["model"] = moderator
    if log is not None:
        overrides["log"] = {"format": log}
    try:
        settings = load_settings(config, overrides)
        from guardrail import server

        if check:
            server.check(settings)
            print("ok")
            return
        server.serve(settings)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def _need_extra() -> None:
    from guardrail.errors import require

    for module in ("fastapi", "uvicorn", "prometheus_client", "openai"):
        require(module, extra="server")


@keys_app.command("new")
def keys_new(
    name: Annotated[str, typer.Option(help="Whose it is; stands in the logs.")] = "default",
    policy: Annotated[str | None, typer.Option(help="The policy it is under.")] = None,
    may_choose: Annotated[
        list[str] | None,
        typer.Option(help="A policy it may ask for by the header X-Guardrail-Policy; repeatable."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may use, of all; repeatable.")
    ] = None,
    expires: Annotated[
        datetime.datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Its last day (UTC).")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Add it to this file, made if not there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The key and its entry as JSON.")] = False,
) -> None:
    """Make an API key. It is shown now and never again: only its hash is stored."""
    from guardrail._server_keys import hash_key, key_entry, new_key

    named = [("--name", name), ("--policy", policy)]
    named += [("--may-choose", one) for one in may_choose or []]
    named += [("--model", one) for one in model or []]
    _check_key(named, expires)
    key = new_key()
    entry = key_entry(
        name,
        hash_key(key),
        policy=policy,
        policies=may_choose or [],
        models=model or [],
        expires=expires.date() if expires else None,
    )
    shown = f"key: {key}\n\nKeep it now: it is not stored, and cannot be shown again."
    if as_json:
        shown = json.dumps({"key": key, "name": name, "hash": hash_key(key), "entry": entry})
    if config is None:
        print(shown)
    else:
        _add(config, entry, shown)
    if as_json:
        return
    if config is not None:
        print(f"Its hash was added to {config}; restart the server to let it in.")
    else:
        print(f"For the server's config file:\n\n{entry}", end="")


def _check_key(named: Sequence[tuple[str, str | None]], expires: datetime.datetime | None) -> None:
    """Raises UsageError for what `serve` would not read, and for a key that could not be used."""
    from guardrail._server_keys import is_name

    for option, text in named:
        if text is not None and not is_name(text):
            raise UsageError(f"{option} {text!r}: a name is one line of 1 to 200 characters")
    today = datetime.datetime.now(datetime.UTC).date()
    if expires is not None and expires.date() < today:
        raise UsageError(
            f"--expires {expires.date()}: is past, today is {today} (UTC): name a day to come"
        )


def _add(path: Path, entry: str, shown: str) -> None:
    """The entry at the end of a config file, which is whole and valid at every moment, and loses
    none that another process adds meanwhile; once its key is shown, as nobody could use another.
    Raises UsageError, GuardrailError where stdout takes nothing."""
    _need_extra()
    try:
        with _alone_in(path.resolve().parent):
            _append(path, entry, shown)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While no other process adds to a file of that folder."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _append(path: Path, entry: str, shown: str) -> None:
    from guardrail._server_config import ConfigError, load_settings

    if problem := no_place(path):
        raise UsageError(problem)
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    text = f"{old.rstrip()}\n\n{entry}" if old.strip() else entry
    if _is_toml(old) and not _is_toml(text):
        raise UsageError(
            f"{path}: has 'keys' in another form than [[keys]] tables: write them so, or leave "
            "'keys' out where it is empty"
        )
    handle, temporary = tempfile.mkstemp(dir=path.resolve().parent, suffix=path.suffix)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        load_settings(Path(temporary))
        _show(shown, path)
        os.replace(temporary, path.resolve())
    except ConfigError as error:
        raise UsageError(str(error).replace(temporary, str(path))) from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def _show(shown: str, path: Path) -> None:
    try:
        print(shown, flush=True)
    except OSError as error:
        raise GuardrailError(
            f"the key could not be shown: {error.strerror}: nothing was added to {path}; mend that "
            "and make another"
        ) from None


def _is_toml(text: str) -> bool:
    from guardrail._toml import read_toml

    try:
        read_toml(text)
    except ValueError:
        return False
    return True
