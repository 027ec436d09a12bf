from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guardrail import errors
from guardrail.errors import (
    Blocked,
    GuardrailError,
    MissingExtra,
    ModerationError,
    Overloaded,
    PolicyError,
    UpstreamError,
    require,
)
from guardrail.taxonomy import Direction
from guardrail.verdict import Action, Verdict

ROOT = Path(errors.__file__).parents[1]


def test_every_error_is_one_of_the_family() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), GuardrailError)
    assert issubclass(PolicyError, ValueError)
    assert issubclass(MissingExtra, ImportError)


@pytest.mark.parametrize(
    "error",
    [
        ModerationError("no"),
        UpstreamError("gone", status=502),
        Overloaded("full", retry_after=2.5),
        Blocked(Verdict(Action.REFUSE, Direction.INPUT, policy="strict@1")),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("duplicate", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_errors_survive_the_way_between_processes(
    error: GuardrailError, duplicate: Callable[[GuardrailError], GuardrailError]
) -> None:
    again = duplicate(error)
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_blocked_text_says_why_in_its_error() -> None:
    verdict = Verdict(Action.REFUSE, Direction.INPUT, policy="strict@1")
    assert str(Blocked(verdict)) == verdict.summary()


def test_a_present_module_is_imported() -> None:
    assert require("json", extra="cpu").loads("[1]") == [1]


@pytest.mark.parametrize("module", ["no_such_module", "no_such_module.inside"])
def test_a_missing_extra_names_the_pip_line(module: str) -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'guardrail-severity\[cpu\]'"):
        require(module, extra="cpu")


def test_a_missing_dependency_of_a_present_module_is_named_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "present_module.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all") as caught:
        require("present_module", extra="cpu")
    assert not isinstance(caught.value, MissingExtra)


def test_the_remnant_of_an_uninstalled_module_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_gone" / "capi").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra, match=r"delete .*half_gone, then pip install"):
        require("half_gone", extra="cpu")


@pytest.mark.parametrize("broken", ["raise ImportError('libfoo.so.1: no such file')", "pass"])
def test_an_onnxruntime_that_does_not_load_is_one_line_with_its_cure(
    broken: str, tmp_path: Path
) -> None:
    (tmp_path / "onnxruntime.py").write_text(f"{broken}\n")
    done = subprocess.run(
        [sys.executable, "-m", "guardrail.cli", "check", "--prompt", "hello"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("error: onnxruntime does not load: ")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install" in line


def test_without_onnxruntime_the_guard_says_what_to_install() -> None:
    program = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'onnxruntime':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import guardrail\n"
        "try:\n    guardrail.Guard()\n"
        "except guardrail.MissingExtra as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "onnxruntime is not installed; it comes with: pip install 'guardrail-severity[cpu]'\n"
    )
