"""The public surface, frozen: a change here is a change for every user, and needs a decision."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import guardrail
from guardrail import artifact, encoding, errors, moderator, policy, taxonomy, testing, verdict
from guardrail import guard as guard_module

SIGNATURES = {
    "Guard": "(model: 'str | Path | Moderator' = 'small', policy: 'str | Path | Policy' = "
    "'balanced', *, device: 'Device' = 'auto', timeout: 'float | None' = None, audit: "
    "'Callable[[Pair, Verdict], None] | None' = None) -> 'None'",
    "Guard.check": "(self, prompt: 'str | None' = None, response: 'str | None' = None) -> "
    "'Verdict'",
    "Guard.acheck": "(self, prompt: 'str | None' = None, response: 'str | None' = None) -> "
    "'Verdict'",
    "Guard.check_many": "(self, pairs: 'Sequence[Pair]') -> 'list[Verdict]'",
    "Guard.acheck_many": "(self, pairs: 'Sequence[Pair]') -> 'list[Verdict]'",
    "OnnxModerator": "(model: 'str | Path' = 'small', *, device: 'Device' = 'auto', threads: "
    "'int | None' = None, locate: 'bool' = True, max_chars: 'int' = 2000000) -> 'None'",
    "OnnxModerator.assess": "(self, pairs: 'Sequence[Pair]') -> 'list[Assessment]'",
    "Policy": "(name: 'str', version: 'int' = 1, description: 'str' = '', input: 'Rules' = "
    "Rules(), output: 'Rules' = Rules(), on_error: 'Action' = <Action.REFUSE: 'refuse'>, "
    "unreadable: 'Action' = <Action.FLAG: 'flag'>, refusal: 'str' = '', "
    "refusals: 'Mapping[Category, str]' = <factory>, language: 'str' = 'en') -> None",
    "Policy.load": "(source: 'str | Path') -> 'Policy'",
    "Policy.parse": "(text: 'str', *, where: 'str' = 'policy') -> 'Policy'",
    "Policy.decide": "(self, assessment: 'Assessment', model: 'Thresholds | None' = None) -> "
    "'Verdict'",
    "Policy.fail": "(self, direction: 'Direction', error: 'str') -> 'Verdict'",
    "Policy.rules": "(self, direction: 'Direction') -> 'Rules'",
    "Pair": "(prompt: 'str', response: 'str | None' = None) -> None",
    "Passage": "(start: 'int', end: 'int', probability: 'float') -> None",
    "Reason": "(category: 'Category', severity: 'Severity', probability: 'float', threshold: "
    "'float') -> None",
    "Assessment": "(direction: 'Direction', severity_probabilities: 'Mapping[Severity, float]', "
    "categories: 'Mapping[Category, float]', passages: 'tuple[Passage, ...]' = (), model: 'str' = "
    "'', unreadable: 'bool' = False) -> None",
    "Verdict": "(action: 'Action', direction: 'Direction', severity: 'Severity' = "
    "<Severity.NONE: 0>, reasons: 'tuple[Reason, ...]' = (), assessment: 'Assessment | None' = "
    "None, policy: 'str' = '', degraded: 'bool' = False, error: 'str | None' = None, latency_ms: "
    "'float' = 0.0) -> None",
    "Verdict.summary": "(self) -> 'str'",
    "Verdict.to_json": "(self) -> 'dict[str, Any]'",
}


def test_the_exported_names_are_these() -> None:
    assert guardrail.__all__ == sorted(guardrail.__all__, key=lambda n: (not n.isupper(), n))
    assert set(guardrail.__all__) == {
        "TAXONOMY_VERSION", "Action", "ArtifactError", "Assessment", "Blocked", "Category",
        "ChatResult", "Direction", "Guard", "GuardedChat", "GuardrailError", "MissingExtra",
        "ModerationError", "Moderator", "OnnxModerator", "Pair", "Passage", "Policy",
        "PolicyError", "Reason", "Severity", "Thresholds", "UpstreamError", "Verdict",
    }  # fmt: skip


@pytest.mark.parametrize("name", guardrail.__all__)
def test_every_exported_name_is_there_and_listed(name: str) -> None:
    assert getattr(guardrail, name) is not None
    assert name in dir(guardrail)


def test_nothing_public_is_left_out_of_all() -> None:
    public = {
        name
        for name, value in vars(guardrail).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public - set(guardrail.__all__) <= {"annotations", "TYPE_CHECKING", "Any"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Gard'"):
        _ = guardrail.Gard  # type: ignore[attr-defined]


def test_a_star_import_brings_all_of_it() -> None:
    program = "from guardrail import *; print(Guard, Verdict, OnnxModerator, GuardedChat)"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_frozen(name: str) -> None:
    target = guardrail
    for part in name.split("."):
        target = getattr(target, part)
    found = str(inspect.signature(target))  # type: ignore[arg-type]
    rules = repr(policy.Rules())
    assert found.replace(rules, "Rules()") == SIGNATURES[name]


@pytest.mark.parametrize(
    "module",
    [artifact, encoding, errors, guard_module, moderator, policy, taxonomy, testing, verdict],
    ids=lambda module: module.__name__,
)
def test_a_module_exports_what_it_defines_in_public(module: ModuleType) -> None:
    exported = set(module.__all__)
    assert all(hasattr(module, name) for name in exported)
    defined = {
        name
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }
    for_the_package = {
        "require",
        "calibrated",
        "installed_models",
        "is_path",
        "policy_files",
        "stage_of",
    }
    assert defined - exported <= for_the_package


def test_public_names_are_explained() -> None:
    for name in guardrail.__all__:
        value = getattr(guardrail, name)
        if inspect.isclass(value):
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_the_package_is_typed() -> None:
    from importlib import resources

    assert resources.files("guardrail").joinpath("py.typed").is_file()
