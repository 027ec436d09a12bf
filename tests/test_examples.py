"""Every example runs as a user would run it, offline, and says what its reader expects."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# What has to stand in the output, in this order. What the bundled model thinks of a text is not
# asked here: an answer may be a refusal.
EXPECTED = {
    "custom_moderator.py": [
        r"^verdict: redact: moderate Privacy Violation 1\.00 \(policy balanced@1\)$",
        r"^answer: Write to \[redacted\], she knows\.$",
        r"^stream: Write to \[redacted\], she knows\.$",
    ],
    "custom_policy.py": [
        r"^input Insulting Behavior: \{'minor': 'flag', 'moderate': 'flag', 'severe': 'flag'\}$",
        r"^output Insulting Behavior: "
        r"\{'minor': 'refuse', 'moderate': 'refuse', 'severe': 'refuse'\}$",
        r"^output Privacy Violation: "
        r"\{'minor': 'redact', 'moderate': 'redact', 'severe': 'refuse'\}$",
        r"^verdict: \w+: .* \(policy support-desk@1\)$",
        r"^error: policy: key 'output\.minor': 'refsue' is not an action .*mean 'refuse'\?$",
    ],
    "fastapi_stream.py": [
        r"^status: 200$",
        r"^answer: (You said: Which bread is good with tomato soup\?|I'm sorry)",
    ],
    "openai_client.py": [
        r"^no CHAT_URL and no OPENAI_API_KEY: a local stand-in answers",
        r"^answer: (Paris is the capital of France\.|I'm sorry)",
        r"^finish_reason: (stop|content_filter)$",
        r"^input verdict: \w+$",
    ],
    "langchain_agent.py": [
        r"^model: (\['weather'\]|I'm sorry)",
        r"^verdict: \w+$",
        r"^blocked: (True|False)$",
    ],
    "lcel_pipe.py": [
        r"^model: (Boil the water, then let the tea stand\.|I'm sorry)",
        r"^chain: (Boil the water, then let the tea stand\.|I'm sorry)",
        r"^verdict: \w+$",
    ],
    "multi_tenant.py": [
        r"^school: \w+ under strict@1$",
        r"^hospital: \w+ under hospital@1$",
        r"^research: (allow|flag) under audit-only@1$",
        r"^a stranger: \w+ under strict@1$",
    ],
    "openai_compatible_url.py": [
        r"^CHAT_URL is not set: a local stand-in answers",
        r"^answer: (Paris is the capital of France\.|I'm sorry)",
        r"^finish_reason: (stop|content_filter)$",
    ],
    "plain_callable.py": [
        r"^text: (You said: Which bread is good with tomato soup\?|I'm sorry)",
        r"^finish_reason: (stop|content_filter)$",
        r"^input verdict: \w+: .* \(policy balanced@1\)$",
        r"^stream: (You said: And which cheese\?|I'm sorry)",
        r"^blocked: (True|False)$",
    ],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_example_runs_and_prints_what_it_promises(name: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CHAT_", "OPENAI_"))}
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=EXAMPLES.parent,
        env=env | {"PYTHONPATH": str(EXAMPLES.parent), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    at = 0
    for pattern in EXPECTED[name]:
        found = re.compile(pattern, re.MULTILINE).search(run.stdout, at)
        assert found, f"{pattern!r} is not in the rest of:\n{run.stdout}"
        at = found.end()
