"""`guardrail keys new`, and what a key may do."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from server_kit import ChatApi, serving
from typer.testing import CliRunner

from guardrail._cli_server import _add
from guardrail._server_config import Key, load_settings
from guardrail._server_keys import find_key, hash_key, is_name, key_entry, new_key
from guardrail.cli import app

TODAY = datetime.date(2026, 1, 15)


def keys_new(*args: str) -> Any:
    return CliRunner().invoke(app, ["keys", "new", *args])


def test_no_two_keys_are_alike_and_none_is_stored() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert key not in key_entry("app", hash_key(key))


@given(st.text(), st.text())
def test_a_key_is_found_by_its_hash_alone(token: str, other: str) -> None:
    keys = [Key(name="a", hash=hash_key(other)), Key(name="b", hash=hash_key(token))]
    found = find_key(token, keys, TODAY)
    assert found is not None
    assert found.name == "b"
    assert (find_key(token, keys[:1], TODAY) is None) == (token != other)


def test_a_key_is_good_until_the_end_of_its_last_day() -> None:
    for expires, good in ((TODAY, True), (TODAY - datetime.timedelta(1), False)):
        keys = [Key(name="a", hash=hash_key("k"), expires=expires)]
        assert (find_key("k", keys, TODAY) is not None) is good


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50))
def test_an_entry_is_toml_whatever_the_name(name: str) -> None:
    entry = key_entry(name, hash_key("k"), policies=[name], expires=TODAY)
    (read,) = tomllib.loads(entry)["keys"]
    assert read == {"name": name, "hash": hash_key("k"), "policies": [name], "expires": TODAY}


def test_keys_new_shows_the_key_once_and_prints_the_entry() -> None:
    done = keys_new("--name", "app", "--policy", "strict", "--expires", "2030-01-31")
    assert done.exit_code == 0
    key = done.stdout.split("key: ")[1].split()[0]
    (entry,) = tomllib.loads(done.stdout[done.stdout.index("[[keys]]") :])["keys"]
    assert entry["hash"] == hash_key(key)
    assert (entry["policy"], entry["expires"]) == ("strict", datetime.date(2030, 1, 31))
    assert done.stdout.count(key) == 1


def test_keys_new_adds_to_a_config_file_and_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "guardrail.toml"
    path.write_text('# ours\nhost = "0.0.0.0"\n[limits]\nchats = 3 # few\n')
    before = path.read_text()
    keys = [json.loads(keys_new("--name", n, "--config", str(path), "--json").stdout)["key"]
            for n in ("one", "two")]  # fmt: skip
    assert path.read_text().startswith(before)
    settings = load_settings(path)
    assert [key.hash for key in settings.keys] == [hash_key(key) for key in keys]
    assert settings.limits.chats == 3
    assert not any(key in path.read_text() for key in keys)
    assert list(tmp_path.iterdir()) == [path]


def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "guardrail.toml"

    def add_some(who: int) -> None:
        for n in range(4):
            _add(path, key_entry(f"{who}-{n}", hash_key(new_key())), "its key")

    fork = multiprocessing.get_context("fork")
    makers = [fork.Process(target=add_some, args=(who,)) for who in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(120)
    assert len(load_settings(path).keys) == 16
    assert [file.name for file in tmp_path.iterdir()] == ["guardrail.toml"]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_key_that_could_not_be_shown_is_not_stored(tmp_path: Path, unbuffered: str) -> None:
    path = tmp_path / "guardrail.toml"
    path.write_text('host = "0.0.0.0"\n')
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "guardrail.cli", "keys", "new", "--config", str(path)],
            stdout=full,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            timeout=100,
        )
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert f"No space left on device: nothing was added to {path}" in line
    assert path.read_text() == 'host = "0.0.0.0"\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["keys = []\n", "keys = 5\n", "[keys]\nname = 'a'\n"])
def test_keys_in_another_form_than_tables_are_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "guardrail.toml"
    path.write_text(text)
    done = keys_new("--config", str(path))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "has 'keys' in another form than [[keys]] tables" in done.stderr
    assert path.read_text() == text


def test_a_new_file_with_keys_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "guardrail.toml"
    assert keys_new("--config", str(path)).exit_code == 0
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--name", "app"], "line 6: key 'keys[2].name': key 1 has the same name"),
        (["--name", "b", "--policy", "strikt"], "did you mean 'strict'?"),
    ],
)
def test_what_would_not_be_read_is_not_written(tmp_path: Path, args: list[str], said: str) -> None:
    path = tmp_path / "guardrail.toml"
    path.write_text(key_entry("app", hash_key("k")))
    before = path.read_text()
    done = keys_new("--config", str(path), *args)
    assert done.exit_code == 2
    assert said in done.stderr
    assert str(path) in done.stderr
    assert done.stdout == ""
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@given(st.text(max_size=210))
def test_a_name_that_is_taken_is_one_that_the_server_reads(name: str) -> None:
    if is_name(name):
        (entry,) = tomllib.loads(key_entry(name, hash_key("k"), models=[name]))["keys"]
        assert Key.model_validate(entry).name == name


@pytest.mark.parametrize("option", ["--name", "--policy", "--may-choose", "--model"])
@pytest.mark.parametrize("text", ["", " ", "a\nb", "x" * 201, "\udcff"])
def test_a_name_that_the_server_would_not_read_makes_no_key(option: str, text: str) -> None:
    done = keys_new(f"{option}={text}")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"{option} {text!r}: a name is one line of 1 to 200 characters" in done.stderr


def test_a_key_that_has_expired_already_is_not_made(tmp_path: Path) -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    for path in ([], ["--config", str(tmp_path / "guardrail.toml")]):
        done = keys_new("--expires", str(today - datetime.timedelta(1)), *path)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "is past" in done.stderr
        assert list(tmp_path.iterdir()) == []
    assert keys_new("--expires", str(today + datetime.timedelta(1))).exit_code == 0


# --- what a key may do ---------------------------------------------------------------------------


def keys(**more: Any) -> list[dict[str, Any]]:
    return [
        {"name": "app", "hash": hash_key("gr-app")},
        {"name": "old", "hash": hash_key("gr-old"), "expires": datetime.date(2020, 1, 1)},
        {"name": "kids", "hash": hash_key("gr-kids"), "policy": "strict", **more},
    ]


@pytest.mark.parametrize("path", ["/moderations", "/chat/completions", "/models", "/models/x"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer gr-old"},
        {"Authorization": "Basic gr-app"},
        {"Authorization": "gr-app"},
        {"Authorization": b"Bearer gr-\xff\xfe"},
    ],
    ids=str,
)
def test_without_a_good_key_there_is_a_401(keyed: Any, path: str, headers: dict[str, Any]) -> None:
    method = "GET" if path.startswith("/models") else "POST"
    answer = httpx.request(method, f"{keyed.url}{path}", headers=headers, timeout=30)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.fixture(scope="module")
def keyed() -> Any:
    with serving(keys=keys(policies=["permissive"])) as server:
        yield server


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_may_ask_by_head(keyed: Any, path: str) -> None:
    answer = httpx.head(f"{keyed.root}{path}")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_need_no_key(keyed: Any, path: str) -> None:
    assert httpx.get(f"{keyed.root}{path}", timeout=30).status_code == 200


def test_each_key_has_its_own_policy_and_may_choose_where_it_may(keyed: Any) -> None:
    def action(key: str, **headers: str) -> str:
        with OpenAI(base_url=keyed.url, api_key=key, max_retries=0) as client:
            answer: Any = client.moderations.create(input="an insult", extra_headers=headers)
        verdict: dict[str, Any] = answer.results[0].guardrail
        return f"{verdict['policy']} {verdict['action']}"

    assert action("gr-app") == "balanced@1 flag"
    assert action("gr-kids") == "strict@1 refuse"
    assert action("gr-kids", **{"X-Guardrail-Policy": "strict"}) == "strict@1 refuse"
    assert action("gr-kids", **{"X-Guardrail-Policy": "permissive"}) == "permissive@1 allow"
    for key, policy in (("gr-app", "permissive"), ("gr-kids", "audit-only"), ("gr-kids", "x")):
        with pytest.raises(openai.PermissionDeniedError, match="may not choose the policy"):
            action(key, **{"X-Guardrail-Policy": policy})


def test_a_key_uses_and_sees_its_models_alone() -> None:
    api = ChatApi()
    models = {"fast": {"upstream": "local"}, "good": {"upstream": "local"}}
    asked: Any = [{"role": "user", "content": "Hello"}]
    try:
        with (
            serving(upstream=api.url, models=models, keys=keys(models=["fast"])) as server,
            OpenAI(base_url=server.url, api_key="gr-kids", max_retries=0) as client,
        ):
            assert [model.id for model in client.models.list()] == ["fast", "fake"]
            client.chat.completions.create(model="fast", messages=asked)
            with pytest.raises(openai.PermissionDeniedError, match="may not use the model 'good'"):
                client.chat.completions.create(model="good", messages=asked)
    finally:
        api.running.stop()
    assert "authorization" not in api.headers[0]
