"""The files under deploy/ and the Dockerfile: that they fit the command, its routes, each other."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from fresh_kit import ROOT

from guardrail._cli_server import keys_app, serve
from guardrail._server_config import Limits, Settings, load_settings
from guardrail.server import create_app
from guardrail.testing import FakeModerator

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
DEPLOYMENT, SERVICE = yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
DEPLOYED = [ROOT / "Dockerfile", *sorted((ROOT / "deploy").iterdir())]


def command() -> list[str]:
    """What a container runs: the entry point and its default arguments."""
    parts = [re.search(rf"^{word} (\[.*\])$", DOCKERFILE, re.M) for word in ("ENTRYPOINT", "CMD")]
    assert all(parts), "not in exec form: a shell would keep SIGTERM for itself"
    return [word for part in parts if part for word in json.loads(part[1])]


def options(function: Any) -> set[str]:
    app = typer.Typer()
    app.command()(function)
    return {name for param in typer.main.get_command(app).params for name in param.opts}


def config_path() -> str:
    words = command()
    return words[words.index("--config") + 1]


def paths() -> set[str]:
    """The paths that the server answers."""
    app = create_app(Settings(), moderator=FakeModerator({}))
    return {route.path for route in app.routes}  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", DEPLOYED, ids=lambda path: path.name)
def test_every_option_that_is_named_is_one_of_the_command(path: Path) -> None:
    known = {
        "guardrail serve": options(serve),
        "guardrail keys new": options(keys_app.registered_commands[0].callback),
    }
    lines = [shlex.join(command())] if path.name == "Dockerfile" else path.read_text().splitlines()
    for line in lines:
        for name, its in known.items():
            if name in line:
                used = re.findall(r"(?<!\S)--[a-z-]+", line.partition(name)[2].split("#")[0])
                assert set(used) <= its, line


def test_the_container_starts_the_server_beyond_loopback_on_the_port_that_is_published() -> None:
    words = command()
    assert words[:2] == ["guardrail", "serve"]
    port = words[words.index("--port") + 1]
    assert words[words.index("--host") + 1] == "0.0.0.0"
    assert f"EXPOSE {port}\n" in DOCKERFILE
    assert [one.split(":")[1] for one in COMPOSE["services"]["guardrail"]["ports"]] == [port]
    (published,) = CONTAINER["ports"]
    assert str(published["containerPort"]) == port
    assert DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == port
    assert f"127.0.0.1:{port}/" in DOCKERFILE


def test_the_config_is_mounted_where_the_command_reads_it() -> None:
    (mount,) = COMPOSE["services"]["guardrail"]["volumes"]
    source, target, mode = mount.split(":")
    assert (target, mode) == (config_path(), "ro")
    assert (ROOT / "deploy" / source).is_file()
    mounts = {each["name"]: each["mountPath"] for each in CONTAINER["volumeMounts"]}
    volumes = {each["name"]: each for each in POD["volumes"]}
    assert set(mounts) == set(volumes)
    assert mounts["config"] == str(Path(config_path()).parent)
    made = (ROOT / "deploy/kubernetes.yaml").read_text()
    secret, file = re.search(r"create secret generic (\S+) --from-file=(\S+)", made).groups()  # type: ignore[union-attr]
    assert volumes["config"]["secret"]["secretName"] == secret
    assert file == Path(config_path()).name


def test_the_config_of_compose_names_the_model_beside_it_and_lacks_but_a_key() -> None:
    path = ROOT / "deploy/guardrail.toml"
    settings = load_settings(path)
    hosts = {one.url.split("/")[2].split(":")[0] for one in settings.upstreams.values()}
    assert hosts == {"model"}
    assert "model" in COMPOSE["services"]
    with pytest.raises(ValueError, match="guardrail keys new"):
        load_settings(path, {"host": "0.0.0.0"})


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_a_probe_asks_for_a_path_that_is_there(probe: str) -> None:
    asked = CONTAINER[probe]["httpGet"]
    assert asked["path"] in paths()
    assert asked["port"] in {port["name"] for port in CONTAINER["ports"]}


def test_what_else_is_asked_over_http_is_there() -> None:
    checked = re.findall(r"127\.0\.0\.1:\d+(/\w+)", DOCKERFILE)
    assert checked == ["/readyz"]
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert {*checked, annotations["prometheus.io/path"]} <= paths()
    (port,) = SERVICE["spec"]["ports"]
    assert port["targetPort"] in {each["name"] for each in CONTAINER["ports"]}
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == labels
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels


def test_a_container_is_given_longer_to_end_than_the_server_takes() -> None:
    limits = load_settings(ROOT / "deploy/guardrail.toml").limits
    before = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    # uvicorn waits 3 s more than open requests have, and the model is then let go.
    margin = 5
    assert POD["terminationGracePeriodSeconds"] >= before + Limits().shutdown_seconds + margin
    grace = COMPOSE["services"]["guardrail"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) >= limits.shutdown_seconds + margin


def test_the_user_of_the_pod_is_the_one_of_the_image() -> None:
    uid = re.search(r"--uid (\d+)", DOCKERFILE)
    assert uid
    assert POD["securityContext"]["runAsUser"] == int(uid[1])


def test_litellm_speaks_to_the_port_and_the_path_of_the_server() -> None:
    config = yaml.safe_load((ROOT / "deploy/litellm.yaml").read_text())
    for one in config["guardrails"]:
        base = one["litellm_params"]["api_base"]
        assert base == f"http://localhost:{Settings().port}/v1"
    assert "/v1/moderations" in paths()
