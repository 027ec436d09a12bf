"""Which module may import which; and what `import guardrail` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "guardrail"
MODULES = sorted(PACKAGE.glob("**/*.py"))
PURE = ("taxonomy", "verdict", "policy", "_policy_values", "_toml", "errors")
# What an edge module may import beyond the core: it is named after it, and behind its own extra.
EDGES = {
    "langchain": {"langchain", "langchain_core"},
    "openai": {"openai"},
    "scan": {"ray", "pyarrow", "huggingface_hub"},
    "server": {
        "fastapi",
        "openai",
        "opentelemetry",
        "prometheus_client",
        "starlette",
        "uvicorn",
    },
}
HEAVY = {"torch", "transformers", "gradio", "langchain", "langchain_core", "onnxruntime", "openai"}
NEVER = {"torch", "transformers", "gradio", "datasets", "training", "demo", "examples", "tests"}


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports anywhere, its functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found.add((node.module or "").partition(".")[0])
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name | ast.Attribute)
            and (getattr(node.func, "id", None) or getattr(node.func, "attr", None))
            in ("require", "import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value).partition(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_sdk_never_imports_training_or_its_libraries(path: Path) -> None:
    assert not imported(path) & NEVER


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_framework_is_imported_by_its_own_edge_only(path: Path) -> None:
    name = path.stem.lstrip("_").partition("_")[0]
    others = set().union(*EDGES.values()) - EDGES.get(name, set())
    assert not imported(path) & others


@pytest.mark.parametrize("name", PURE)
def test_the_pure_modules_import_the_standard_library_and_each_other(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    assert imported(path) - set(sys.stdlib_module_names) <= {"guardrail"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("guardrail."):
            assert (node.module or "").removeprefix("guardrail.") in PURE


@pytest.mark.parametrize("name", ["encoding", "artifact"])
def test_encoding_and_artifact_need_no_runtime(name: str) -> None:
    allowed = {"guardrail", "numpy", "tokenizers"}
    assert imported(PACKAGE / f"{name}.py") - set(sys.stdlib_module_names) <= allowed


def loaded_by(program: str) -> set[str]:
    program += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_the_standard_library_only() -> None:
    bare = loaded_by("")
    own = loaded_by("import guardrail") - bare - set(sys.stdlib_module_names)
    assert own == {"guardrail"}


def test_importing_the_guard_loads_no_heavy_library() -> None:
    assert not loaded_by("from guardrail import Guard, GuardedChat") & HEAVY


def test_the_command_line_loads_no_heavy_library() -> None:
    assert not loaded_by("import guardrail.cli") & (HEAVY | {"numpy", "tokenizers"})


def test_importing_the_package_takes_less_than_0_3_seconds() -> None:
    """Its own share, by importtime, the best of several: the machine may be busy."""

    def seconds() -> float:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", "import guardrail"],
            capture_output=True, text=True, check=True, cwd=ROOT,
        )  # fmt: skip
        (line,) = (x for x in done.stderr.splitlines() if x.endswith(" | guardrail"))
        return int(line.split("|")[1]) / 1e6

    best = float("inf")
    for _ in range(10):
        best = min(best, seconds())
        if best < 0.3:
            break
    assert best < 0.3
