"""The config file of `guardrail serve`: every mistake is named with its key and its line."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from guardrail import Category
from guardrail._onnx import Device
from guardrail._server_config import (
    AuditSettings,
    ConfigError,
    Key,
    Limits,
    LogSettings,
    ModelSettings,
    NamedModel,
    Settings,
    Upstream,
    load_settings,
)
from guardrail._server_keys import hash_key
from guardrail._server_moderations import OPENAI_CATEGORIES, OPENAI_CATEGORY
from guardrail._server_source import line_of
from guardrail.artifact import artifact_folder
from guardrail.cli import app
from guardrail.server import create_app
from guardrail.testing import FakeModerator

HASH = hash_key("k")
WHOLE = f"""
host = "0.0.0.0"
port = 9000
workers = 2
policy = "strict"
header_policies = []
context_turns = 2
default_upstream = "local"

[policies]
desk = "desk.toml"

[model]
name = "small"
device = "cpu"
threads = 1
batching = false

[limits]
body_bytes = 2048
request_seconds = 5
chats = 7

[log]
format = "json"
level = "warning"

[audit]
path = "audit.jsonl"
fsync = "interval"

[upstreams.local]
url = "http://localhost:11434/v1"
timeout = 3.5
headers = {{ "X-Team" = "safety" }}

[models.fast]
upstream = "local"
name = "llama3.2:1b"

[[keys]]
name = "app"
hash = "{HASH}"
policy = "desk"
policies = ["permissive"]
models = ["fast"]
expires = 2030-01-31
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "desk.toml").write_text('name = "desk"\nextends = "balanced"\n')
    return tmp_path


def load(folder: Path, text: str, **overrides: Any) -> Settings:
    path = folder / "guardrail.toml"
    path.write_text(text)
    return load_settings(path, overrides)


def test_everything_can_be_said(folder: Path) -> None:
    settings = load(folder, WHOLE)
    assert (settings.port, settings.workers, settings.limits.chats) == (9000, 2, 7)
    assert settings.policy_source("desk") == str(folder / "desk.toml")
    assert settings.keys[0].expires == datetime.date(2030, 1, 31)
    assert settings.audit is not None
    assert settings.audit.path == str(folder / "audit.jsonl")
    assert settings.upstreams["local"].headers == {"X-Team": "safety"}
    assert set(settings.policy_names()) == {"strict", "desk", "permissive"}


def test_the_path_may_be_a_text_as_well(folder: Path) -> None:
    assert load(folder, WHOLE) == load_settings(str(folder / "guardrail.toml"))


def test_policies_of_keys_are_read_from_the_files_folder_and_those_typed_from_where_one_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for place in (here, folder):
        for name in ("kids.toml", "strict"):
            (place / name).write_text('name = "own"\nextends = "balanced"\n')
    monkeypatch.chdir(here)
    keys = f'[[keys]]\nname = "k"\nhash = "{HASH}"\npolicy = "kids.toml"\n'
    settings = load(folder, f'policy = "strict"\nheader_policies = ["kids.toml"]\n{keys}')
    assert settings.policy_source("kids.toml") == str(folder / "kids.toml")
    assert settings.policy_source(settings.policy) == "strict"
    settings = load(folder, 'policy = "kids.toml"\n')
    assert settings.policy_source(settings.policy) == str(folder / "kids.toml")
    settings = load(folder, "", policy="kids.toml")
    assert settings.policy_source(settings.policy) == "kids.toml"


def test_a_policy_of_a_key_that_is_no_policy_is_told_at_the_key(folder: Path) -> None:
    (folder / "kids.toml").write_text("name = 3\n")
    keys = f'[[keys]]\nname = "k"\nhash = "{HASH}"\npolicy = "kids.toml"\n'
    with pytest.raises(ConfigError) as caught:
        load(folder, keys)
    assert "line 4: key 'keys[1].policy': " in str(caught.value)


def test_settings_reach_a_worker_as_they_are(folder: Path) -> None:
    settings = load(folder, WHOLE)
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_nothing_needs_to_be_said() -> None:
    assert load_settings() == Settings()


def test_options_go_over_the_file(folder: Path) -> None:
    settings = load(folder, WHOLE, port=1, model={"device": "auto"})
    assert settings.port == 1
    assert (settings.model.device, settings.model.threads) == ("auto", 1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("port = 9000", "prot = 9000", "key 'prot': unknown key; did you mean 'port'?"),
        ("port = 9000", "port = '9000'", "key 'port': should be a valid integer, not '9000'"),
        ("port = 9000", "port = 70000", "key 'port': should be less than or equal to 65535"),
        ('"strict"', '"strikt"', "key 'policy': no policy 'strikt'; did you mean 'strict'?"),
        ('device = "cpu"', 'device = "cup"', "key 'model.device': should be 'auto', 'cpu',"),
        ('device = "cpu"', 'device = "cup"', "did you mean 'cpu'?"),
        ("body_bytes", "body_byte", "'limits.body_byte': unknown key; did you mean 'body_byt"),
        ("chats = 7", "chats = 0", "key 'limits.chats': should be greater than or equal to 1"),
        ("desk.toml", "dusk.toml", "key 'policies.desk': policy"),
        ('desk = "desk.toml"', 'strict = "desk.toml"', "key 'policies.strict': 'strict' is a"),
        ('upstream = "local"\nname', 'upstream = "locl"\nname',
         "key 'models.fast.upstream': no upstream 'locl'; did you mean 'local'?"),
        ('default_upstream = "local"', 'default_upstream = "loc"', "did you mean 'local'?"),
        ("http://localhost", "htp://localhost", "key 'upstreams.local.url': 'htp://localhost:"),
        ("localhost:11434", "localhost:99999", "key 'upstreams.local.url': 99999 is no port"),
        ('url = "http://localhost:11434/v1"\n', "", "key 'upstreams.local.url': is missing"),
        (HASH, "sha256:123", "key 'keys[1].hash': is not a hash that `guardrail keys new`"),
        ('policy = "desk"', 'policy = "dsk"', "key 'keys[1].policy': no policy 'dsk'; did you"),
        ('["permissive"]', '[\n "strict",\n "permisive"]', "key 'keys[1].policies[2]': no pol"),
        ('models = ["fast"]', 'models = ["fats"]', "key 'keys[1].models[1]': no model 'fats'"),
        ("2030-01-31", '"soon"', "key 'keys[1].expires': is no date"),
        ("timeout = 3.5", "forward_key = true", "key 'upstreams.local.forward_key'"),
        ('desk = "desk.toml"', 'balanced = ""', "key 'policies.balanced': is empty"),
        ('name = "app"', 'name = "a\\u0001b"', "key 'keys[1].name': holds a line break or ano"),
        ('"safety"', '"a\\nb"', "key 'upstreams.local.headers.X-Team': the header 'X-Team' holds"),
        ('"X-Team"', '"X Team"', "key 'upstreams.local.headers.X Team': 'X Team' is no name of"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(folder: Path, old: str, new: str, said: str) -> None:
    assert WHOLE.count(old) == 1
    with pytest.raises(ConfigError) as raised:
        load(folder, WHOLE.replace(old, new))
    message = str(raised.value)
    line = WHOLE[: WHOLE.index(old)].count("\n") + 1 - ("is missing" in said)
    assert f"guardrail.toml, line {line}: key '" in message
    assert said in message
    assert "\n" not in message


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load(folder, 'prot = 1\npolcy = "x"\n[limits]\nchats = "many"\n')
    assert [f"line {n}: " in str(raised.value) for n in (1, 2, 4)] == [True] * 3


def test_a_byte_order_mark_is_no_mistake_and_stays(folder: Path) -> None:
    path = folder / "guardrail.toml"
    path.write_bytes(b"\xef\xbb\xbfport = 9001\r\n")
    assert load_settings(path).port == 9001
    done = CliRunner().invoke(app, ["keys", "new", "--config", str(path)])
    assert (done.exit_code, load_settings(path).keys[0].name) == (0, "default")


def test_a_policy_file_that_is_not_there_is_told_once(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, 'policy = "x"\n[policies]\nx = "nowhere.toml"\n')
    assert "line 3: key 'policies.x': policy " in str(caught.value)
    assert "key 'policy'" not in str(caught.value)


@pytest.mark.parametrize("day", ['"2030-01-31"', "2030-01-31T00:00:00", "2030"])
def test_a_last_day_that_is_no_date_is_told_how_to_be_written(folder: Path, day: str) -> None:
    with pytest.raises(ConfigError, match=r"line 4: key 'keys\[1\]\.expires': is no date: write"):
        load(folder, f'[[keys]]\nname = "a"\nhash = "{HASH}"\nexpires = {day}\n')


def test_what_is_no_toml_is_named_with_its_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"not valid TOML: .*line 2"):
        load(folder, "port = 1\nhost = \n")
    with pytest.raises(ConfigError, match=r"not valid TOML: .*digits"):
        load(folder, f"port = {'9' * 5000}\n")
    with pytest.raises(ConfigError, match=r"not valid TOML: a number has more than 64 bits"):
        load(folder, f"port = 0x{'F' * 5000}\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(folder / "nowhere.toml")
    (folder / "latin.toml").write_bytes(b"# \xff\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(folder / "latin.toml")


def test_two_keys_are_two(folder: Path) -> None:
    twice = WHOLE + f'\n[[keys]]\nname = "app"\nhash = "{HASH}"\n'
    with pytest.raises(ConfigError) as raised:
        load(folder, twice)
    assert "line 50: key 'keys[2].name'" in str(raised.value)
    assert "line 51: key 'keys[2].hash'" in str(raised.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "guard.example"])
def test_a_server_that_others_can_reach_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="there are no keys"):
        load_settings(None, {"host": host})
    assert load_settings(None, {"host": host, "allow_anonymous": True}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "[::1]"])
def test_on_loopback_it_needs_none(host: str) -> None:
    assert load_settings(None, {"host": host}).keys == []


def test_an_ipv6_address_may_stand_in_brackets_as_in_a_url() -> None:
    assert load_settings(None, {"host": "[::1]"}).host == "::1"
    assert load_settings(None, {"host": "[fe80::1%eth0]", "allow_anonymous": True}).host[0] == "f"


@pytest.mark.parametrize(
    "host", ["localhost:80", "[::1]:80", "http://localhost", "[localhost]", "[]", "a b", "::zz"]
)
def test_a_host_is_told_to_be_a_name_or_an_address_alone(host: str) -> None:
    with pytest.raises(ConfigError, match=r"key 'host': should be a name or an address alone"):
        load_settings(None, {"host": host})


_VALUES = st.one_of(
    st.integers(0, 9).map(str),
    st.just('"""\na = 1\n[b]\n"""'),
    st.just("[\n 1,\n # no\n 2 ]"),
    st.just("'# [x]'"),
)


@given(st.lists(st.tuples(st.integers(0, 2), _VALUES), max_size=8))
def test_the_line_of_an_entry_is_where_it_begins(parts: list[tuple[int, str]]) -> None:
    lines, expected = [], {}
    for i, (blank, value) in enumerate(parts):
        lines += ["# a comment", ""][:blank]
        key = f"k{i}"
        expected[key] = len(lines) + 1
        lines += f"{key} = {value}".split("\n")
    text = "\n".join(lines)
    for key, line in expected.items():
        # What stands before an entry without saying anything counts to neither.
        assert line_of(text, (key,)) == line
    assert line_of(text, ("nowhere",)) is None


def test_a_mistake_among_thousands_of_keys_is_found_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f'[[keys]]\nname = "k{i}"\nhash = "sha256:{i:064x}"\n' for i in range(2000)]
    keys.insert(1234, '[[keys]]\nname = "odd"\nhash = "sha256:?"\n')
    parsed = []
    parse = tomllib.loads
    monkeypatch.setattr(tomllib, "loads", lambda text: parsed.append(0) or parse(text))
    with pytest.raises(ConfigError, match=rf"line {1234 * 3 + 3}: key 'keys\[1235\].hash'"):
        load(folder, "".join(keys))
    assert len(parsed) < 50


def test_of_many_mistakes_the_first_are_told_and_the_rest_counted(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, "".join(f"zzz_{i} = 1\n" for i in range(2000)))
    assert "line 20: key 'zzz_19': unknown key; and 1,980 more mistakes" in str(caught.value)
    assert "zzz_20'" not in str(caught.value)


def test_bad_settings_are_one_line_and_exit_2(folder: Path) -> None:
    path = folder / "guardrail.toml"
    path.write_text("prot = 1\n")
    for args in (
        ["--config", str(path)],
        ["--policy", "strikt"],
        ["--host", "0.0.0.0"],
        ["--host", "a..b"],
        ["--port", "99999"],
        ["--upstream", "ftp://x"],
        ["--forward-key"],
        ["--config", str(folder / "none.toml")],
    ):
        done = CliRunner().invoke(app, ["serve", "--check", *args])
        assert done.exit_code == 2, args
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    path.write_text(WHOLE)
    done = CliRunner().invoke(app, ["serve", "--check", "--config", str(path)])
    assert (done.exit_code, done.stdout) == (0, "ok\n")


def test_check_finds_all_that_would_fail_at_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    (folder / "file").write_text("")
    path = folder / "guardrail.toml"
    wrong = {
        "model.name": '[model]\nname = "nope"\n',
        "model.device": '[model]\ndevice = "tensorrt"\n',
        "audit.path": '[audit]\npath = "file/audit.jsonl"\n',
        "audit.key_file": '[audit]\npath = "audit.jsonl"\nkey_file = "no.key"\n',
        "upstreams.a.api_key_env": '[upstreams.a]\nurl = "http://x"\napi_key_env = "NO_SUCH_KEY"\n',
        "host": 'host = "no.such.host.invalid"\nallow_anonymous = true\n',
    }
    together = ("host", "model.name", "audit.key_file", "upstreams.a.api_key_env")
    for parts in [*((key,) for key in wrong), together]:
        text = "\n".join(wrong[key] for key in parts)
        path.write_text(text)
        done = CliRunner().invoke(app, ["serve", "--check", "--config", str(path)])
        assert (done.exit_code, done.stdout) == (2, ""), text
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        for key in wrong:
            word = key.split(".")[-1]
            lines = [n for n, line in enumerate(text.split("\n"), 1) if line.startswith(word)]
            said = [f"guardrail.toml, line {n}: key '{key}': " in done.stderr for n in lines]
            assert (f"key '{key}'" in done.stderr, any(said)) == (key in parts,) * 2, key


def test_a_start_that_fails_names_the_key_as_a_check_does(folder: Path) -> None:
    path = folder / "guardrail.toml"
    for line, key, text in (
        (2, "model.name", '[model]\nname = "nope"\n'),
        (3, "audit.key_file", '[audit]\npath = "audit.jsonl"\nkey_file = "no.key"\n'),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as raised:
            create_app(load_settings(path), moderator=None if "model" in key else FakeModerator({}))
        assert f"guardrail.toml, line {line}: key '{key}': " in str(raised.value)


def test_what_an_option_says_is_not_blamed_on_the_file(folder: Path) -> None:
    path = folder / "guardrail.toml"
    path.write_text('port = 9000\n[model]\nname = "small"\ndevice = "cpu"\n')
    with pytest.raises(ConfigError, match=r"^settings: key 'port': "):
        load_settings(path, {"port": 99_999})
    done = CliRunner().invoke(app, ["serve", "--check", "--config", str(path), "--model", "nope"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: settings: key 'model.name': model 'nope'")


def test_a_models_folder_is_named_from_the_files_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mine").symlink_to(artifact_folder())
    path = folder / "guardrail.toml"
    path.write_text('[model]\nname = "./mine"\n')
    monkeypatch.chdir("/")
    done = CliRunner().invoke(app, ["serve", "--check", "--config", str(path)])
    assert (done.exit_code, done.stdout) == (0, "ok\n"), done.stderr


def test_check_starts_no_audit_log(folder: Path) -> None:
    path = folder / "guardrail.toml"
    path.write_text('[audit]\npath = "audit.jsonl"\n')
    before = sorted(folder.iterdir())
    done = CliRunner().invoke(app, ["serve", "--check", "--config", str(path)])
    assert (done.exit_code, done.stdout) == (0, "ok\n")
    assert sorted(folder.iterdir()) == before


# --- documents -----------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent


def test_the_example_file_is_right_and_shows_the_defaults() -> None:
    path = ROOT / "examples" / "guardrail.toml"
    settings = load_settings(path)
    assert settings.keys == []
    limits = path.read_text().split("[limits]")[1].split("[log]")[0]
    shown = dict(re.findall(r"^# (\w+) = (\d+)", limits, re.MULTILINE))
    assert {name: float(value) for name, value in shown.items()} == Limits().model_dump()
    assert load_settings(ROOT / "deploy" / "guardrail.toml").upstream_name() == "model"


def test_the_example_file_shows_every_setting() -> None:
    text = (ROOT / "examples" / "guardrail.toml").read_text()
    shown = tomllib.loads(re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE))
    tables = {
        "model": ModelSettings, "limits": Limits, "log": LogSettings, "audit": AuditSettings,
    }  # fmt: skip
    assert set(shown) == set(Settings.model_fields)
    for name, table in tables.items():
        assert set(shown[name]) == set(table.model_fields), name
    assert set(shown["upstreams"]["local"]) == set(Upstream.model_fields)
    assert set(shown["models"]["fast"]) == set(NamedModel.model_fields)
    assert set(shown["keys"][0]) == set(Key.model_fields)
    assert shown["audit"]["max_bytes"] == AuditSettings(path="x").max_bytes
    (words,) = re.findall(r"^device = .*# ([a-z, ]+);", text, re.MULTILINE)
    assert tuple(words.split(", ")) == get_args(Device)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_soak_runs_what_the_documents_name() -> None:
    command = "python -m benchmarks.serve --soak 600 --clients 16"
    done = subprocess.run(["make", "-n", "soak"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()  # under another make, what it enters and leaves is among them
    assert any(line.endswith(command) for line in lines), done.stderr
    assert re.search(rf"{command} +# make soak:", (ROOT / "docs" / "server.md").read_text())
    assert "make soak" in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_documents_tell_the_categories_as_they_are() -> None:
    table = (ROOT / "docs" / "server.md").read_text().split("| OpenAI | ours |")[1]
    told: dict[str, set[str]] = {}
    for names, ours in re.findall(r"^\| (`.*?) \| (.*) \|$", table, re.MULTILINE)[:7]:
        for name in re.findall(r"`([^`]+)`", names):
            told[name] = {c.value for c in Category if c.value in ours}
    assert set(told) == set(OPENAI_CATEGORIES)
    for name, ours in told.items():
        assert ours == {c.value for c, theirs in OPENAI_CATEGORY.items() if theirs == name}
