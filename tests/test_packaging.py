"""The wheel: what is in it, and that it works alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import guardrail

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_is_named_after_the_distribution_and_version(wheel: Path) -> None:
    assert wheel.name == f"guardrail_severity-{guardrail.__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "guardrail", f"guardrail_severity-{guardrail.__version__}.dist-info",
    }  # fmt: skip
    assert not [name for name in names if "__pycache__" in name or name.endswith(".partial")]
    inside = {name.removeprefix("guardrail/") for name in names if name.startswith("guardrail/")}
    suffixes = {Path(name).suffix for name in inside}
    assert suffixes <= {".py", ".typed", ".toml", ".onnx", ".json", ""}
    assert {name.split("/")[0] for name in inside if "/" in name} == {
        "languages", "models", "policies",
    }  # fmt: skip


def test_the_wheel_holds_the_policies_the_models_and_the_licences(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    assert {f"guardrail/policies/{name}.toml" for name in guardrail.policy.PRESETS} <= names
    assert {f"guardrail/languages/{name}.toml" for name in guardrail.policy.LANGUAGES} <= names
    manifest = json.loads(archive.read("guardrail/models/small/manifest.json"))
    assert {f"guardrail/models/small/{name}" for name in manifest["files"]} <= names
    assert "guardrail/py.typed" in names
    licences = [name for name in names if ".dist-info/licenses/" in name]
    assert any(name.endswith("licenses/LICENSE") for name in licences)
    assert any("models/small/LICENSE" in name for name in licences)


def test_the_core_depends_on_no_framework(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in archive.read(path).decode().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    core = {requirement.split(">")[0].strip() for requirement in required}
    assert core == {"numpy", "tokenizers", "py3langid", "httpx", "httpx-sse", "typer"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_alone_checks_a_text_offline(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    pip = [str(scripts / "python"), "-m", "pip", "--disable-pip-version-check"]
    index = subprocess.run(
        [*pip, "download", "--no-deps", "--dest", str(tmp_path), "typer>=0.15"],
        capture_output=True, text=True,
    )  # fmt: skip
    if index.returncode:
        pytest.skip(f"pip reaches no index: {index.stderr.strip().splitlines()[-1]}")
    installed = subprocess.run(
        [*pip, "install", f"{wheel}[cpu]"], capture_output=True, text=True, cwd=tmp_path
    )
    assert installed.returncode == 0, installed.stderr[-2000:]
    listed = subprocess.run([*pip, "list", "--format", "json"], capture_output=True, check=True)
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "onnxruntime" in names
    assert not names & {"torch", "transformers", "gradio", "langchain", "openai", "fastapi"}

    # No proxy is there, and no resolver is asked: nothing but the wheel can answer.
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(scripts / "guardrail"), "check", "--prompt", "How do I bake bread?", "--json"],
        capture_output=True, text=True, cwd=tmp_path, env={**clean, **nowhere},
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    verdict = json.loads(done.stdout)
    assert not verdict["degraded"]
    assert len(verdict["categories"]) == 19
    assert verdict["policy"] == "balanced@1"
