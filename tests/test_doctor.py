"""The doctor finds what is wrong with a machine, and says what cures it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

import guardrail
from guardrail import Action, Direction, Pair, Verdict
from guardrail.artifact import artifact_folder
from guardrail.audit import AuditLog
from guardrail.cli import app
from guardrail.doctor import Check, diagnose

ROOT = Path(guardrail.__file__).parents[1]


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.check: check for check in checks}


def doctor(*args: str, path: Path | None = None) -> tuple[int, dict[str, dict[str, str]]]:
    paths = [str(p) for p in (path, ROOT) if p is not None]
    done = subprocess.run(
        [sys.executable, "-m", "guardrail.cli", "doctor", "--json", *args],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        timeout=300,
    )
    return done.returncode, {row["check"]: row for row in json.loads(done.stdout)}


def test_a_sound_machine_passes_every_check() -> None:
    code, rows = doctor("--device", "cpu")
    assert code == 0
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert "got cpu" in rows["device"]["detail"]
    assert " ms " in rows["one check"]["detail"]
    assert metadata.version("onnxruntime") in rows["packages"]["detail"]


def test_both_runtimes_installed_is_a_failure_with_its_cure(tmp_path: Path) -> None:
    record = tmp_path / "onnxruntime_gpu-1.20.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.20.0\n"
    )
    code, rows = doctor(path=tmp_path)
    assert code == 1
    assert rows["packages"]["status"] == "failure"
    assert "onnxruntime-gpu 1.20.0" in rows["packages"]["detail"]
    assert rows["packages"]["cure"].startswith("pip uninstall -y onnxruntime onnxruntime-gpu")


def test_a_missing_runtime_is_a_failure_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'onnxruntime'\", name='onnxruntime')\n"
    )
    code, rows = doctor(path=tmp_path)
    assert code == 1
    assert rows["runtime"]["status"] == "failure"
    assert "pip install" in rows["runtime"]["cure"]
    assert rows["model"]["status"] == "ok"
    assert "one check" not in rows


def test_an_altered_model_is_a_failure(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact_folder(), tmp_path / "model"))
    with (folder / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    rows = by_name(list(diagnose(folder)))
    assert rows["model"].status == "failure"
    assert "altered or damaged" in rows["model"].detail
    assert "device" not in rows


def test_the_model_row_names_its_identity_licence_and_taxonomy() -> None:
    row = by_name(list(diagnose()))["model"]
    manifest = json.loads((artifact_folder() / "manifest.json").read_text())
    for key in ("id", "base", "licence", "taxonomy"):
        assert manifest[key] in row.detail


def test_a_policy_that_fails_open_is_a_warning_only_when_chosen(tmp_path: Path) -> None:
    presets = by_name(list(diagnose()))["presets"]
    assert presets.status == "ok"
    assert presets.detail.endswith("fail open: audit-only")
    mine = tmp_path / "mine.toml"
    mine.write_text('name = "mine"\nextends = "strict"\non_error = "flag"\n')
    for chosen in ("audit-only", str(mine)):
        code, rows = doctor("--policy", chosen)
        assert code == 0
        assert rows["policy"]["status"] == "warning"
        assert "fails open" in rows["policy"]["detail"]


def test_a_policy_that_is_not_valid_is_a_failure(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('name = "mine"\non_error = "alow"\n')
    code, rows = doctor("--policy", str(mine))
    assert code == 1
    assert "did you mean 'allow'?" in rows["policy"]["detail"]
    assert rows["one check"]["status"] == "ok"


def test_a_device_that_cannot_be_had_is_a_failure() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    rows = by_name(list(diagnose(device="cuda")))
    assert rows["device"].status == "failure"
    assert "no CUDAExecutionProvider" in rows["device"].detail


def test_a_model_of_an_older_taxonomy_is_a_failure(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact_folder(), tmp_path / "model"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"taxonomy": "beavertails-14@1"}))
    code, rows = doctor("--model", str(folder))
    assert code == 1
    assert rows["model"]["status"] == "failure"
    assert "made for taxonomy 'beavertails-14@1'" in rows["model"]["detail"]
    assert "one check" not in rows


# What onnxruntime-gpu does where CUDA is not: it lists the provider, and prints what it lacks.
CLAIMS_CUDA = """
def get_available_providers():
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]
def preload_dlls():
    print("Failed to load libcublasLt.so.13")
"""


@pytest.fixture
def gpu_runtime(tmp_path: Path) -> Path:
    """A folder for the path: the onnxruntime that is installed, with a CUDA provider whose library
    needs another one, as a library of pyarrow's does that is taken away from its folder."""
    import onnxruntime

    arrow = Path(pytest.importorskip("pyarrow").__file__).parent
    real, fake = Path(onnxruntime.__file__).parent, tmp_path / "path" / "onnxruntime"
    shutil.copytree(real / "capi", fake / "capi", copy_function=os.symlink)
    init = (real / "__init__.py").read_text()
    (fake / "__init__.py").write_text(init + CLAIMS_CUDA)
    shutil.copy(arrow / "libarrow_python.so", fake / "capi" / "libonnxruntime_providers_cuda.so")
    return fake.parent


@pytest.mark.skipif(sys.platform != "linux", reason="names a Linux library")
@pytest.mark.parametrize(("device", "status"), [("cuda", "failure"), ("auto", "warning")])
def test_cuda_that_lacks_a_library_names_it(gpu_runtime: Path, device: str, status: str) -> None:
    code, rows = doctor("--device", device, path=gpu_runtime)
    assert code == (1 if status == "failure" else 0)
    assert "CUDAExecutionProvider" in rows["runtime"]["detail"]
    assert rows["device"]["status"] == status
    assert re.search(r"(missing:|lacks) lib(arrow|parquet)\w*\.so\.\d+$", rows["device"]["detail"])
    assert "guardrail-severity[gpu]" in rows["device"]["cure"]


def test_an_audit_log_that_can_be_written_is_ok_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    row = by_name(list(diagnose(audit=path)))["audit"]
    assert (row.status, row.detail) == ("ok", f"{path}: can be written, no rows yet")
    assert list(tmp_path.iterdir()) == []
    log = AuditLog(path)
    log(Pair("x"), Verdict(Action.ALLOW, Direction.INPUT))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    code, rows = doctor("--audit", str(path))
    assert code == 0
    assert rows["audit"]["detail"].endswith("can be written, 1 rows")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("where", ["nowhere/audit.jsonl", "file/audit.jsonl", "."])
def test_an_audit_log_that_cannot_be_written_is_a_failure(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    row = by_name(list(diagnose(audit=tmp_path / where)))["audit"]
    assert row.status == "failure"
    assert row.cure
    code, rows = doctor("--audit", str(tmp_path / where))
    assert (code, rows["audit"]["status"]) == (1, "failure")
    assert rows["one check"]["status"] == "ok"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder that even root cannot fill")
def test_a_folder_that_takes_no_files_is_found_though_its_rights_allow_it() -> None:
    row = by_name(list(diagnose(audit=Path("/proc/self/audit.jsonl"))))["audit"]
    assert (row.status, "cannot be written" in row.detail) == ("failure", True)


@pytest.mark.parametrize(
    ("harm", "status", "says"),
    [
        ("head gone", "failure", "its head is missing"),
        ("head edited", "failure", "the head was edited"),
        ("key gone", "failure", "audit.jsonl.key is missing: put the log's key back"),
        ("key open", "warning", "is open to others"),
    ],
)
def test_an_audit_log_that_would_be_refused_is_found(
    tmp_path: Path, harm: str, status: str, says: str
) -> None:
    path = tmp_path / "audit.jsonl"
    AuditLog(path)(Pair("x"), Verdict(Action.ALLOW, Direction.INPUT))
    head, key = (path.with_name(f"audit.jsonl.{name}") for name in ("head", "key"))
    if harm == "head gone":
        head.unlink()
    elif harm == "head edited":
        head.write_bytes(head.read_bytes().replace(b'"seq":1', b'"seq":2'))
    elif harm == "key gone":
        key.unlink()
    elif os.name == "posix":
        key.chmod(0o644)
    else:
        pytest.skip("file rights are POSIX")
    row = by_name(list(diagnose(audit=path)))["audit"]
    assert (row.status, says in row.detail) == (status, True)
    assert row.cure
    assert ("put the log's key back" in row.cure) == (harm == "key gone")


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), ("zz", "at least 32 hexadecimal digits")]
)
@pytest.mark.parametrize("given", [True, False])
def test_a_key_that_would_be_refused_is_found_before_there_are_rows(
    tmp_path: Path, content: str | None, says: str, given: bool
) -> None:
    path = tmp_path / "audit.jsonl"
    key = tmp_path / ("k" if given else "audit.jsonl.key")
    if content is not None:
        key.write_text(content)
    code, rows = doctor("--audit", str(path), *(["--audit-key", str(key)] if given else []))
    row = rows["audit"]
    if content is None and not given:  # made with the log
        assert (code, row["status"]) == (0, "ok")
    else:
        assert (code, row["status"]) == (1, "failure")
        assert says in row["detail"]
        assert row["cure"]


def test_a_log_that_does_not_end_as_its_head_says_is_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    for _ in range(2):
        log(Pair("x"), Verdict(Action.ALLOW, Direction.INPUT))
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    row = by_name(list(diagnose(audit=path)))["audit"]
    assert (row.status, "its head says 2:" in row.detail) == ("failure", True)
    assert "move the log's files away" in row.cure


def test_a_key_without_a_log_is_an_error() -> None:
    done = CliRunner().invoke(app, ["doctor", "--audit-key", "k"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error: --audit-key is of --audit: add --audit LOG\n"


def test_a_model_that_does_not_open_is_not_blamed_on_the_device(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact_folder(), tmp_path / "model"))
    (folder / "model.onnx").write_bytes(b"no graph")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = hashlib.sha256(b"no graph").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for device in ("auto", "cpu"):
        row = by_name(list(diagnose(folder, device=device)))["device"]
        assert (row.status, "onnxruntime cannot open it" in row.detail) == ("failure", True)
        assert "give another --model" in row.cure
        assert "--device auto" not in row.cure
