"""The command line, run as users run it: what it prints, and how it exits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import guardrail
from guardrail import Action, Category, Direction, Guard, Severity
from guardrail._printable import printable
from guardrail._render import console, verdict_view
from guardrail.artifact import artifact_folder
from guardrail.audit import AuditLog
from guardrail.cli import app
from guardrail.testing import FakeModerator

ROOT = Path(guardrail.__file__).parents[1]


def run(
    *args: str | bytes, stdin: bytes = b"", path: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """The real command, in a process of its own; `path` goes before the package on its path."""
    paths = [str(p) for p in (path, ROOT) if p is not None]
    return subprocess.run(
        [sys.executable, "-m", "guardrail.cli", *args],
        input=stdin,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        timeout=500,
    )


def one_line(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The error of a command that said one thing and ended with `code`."""
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert len(text.splitlines()) == 1, text
    assert text.startswith("error: ")
    return text


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact_folder(), tmp_path / "model"))


def hide(module: str, folder: Path) -> Path:
    """A folder that, on the path, makes `module` look as if it was never installed."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {module!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    return folder


# --- check ---------------------------------------------------------------------------------------


def test_check_prints_the_verdict_json_and_exits_by_its_action() -> None:
    done = run("check", "--prompt", "Hello", "--response", "Good morning.", "--json")
    verdict = json.loads(done.stdout)
    assert set(verdict["categories"]) == {c.value for c in Category}
    assert verdict["direction"] == "output"
    assert verdict["policy"] == "balanced@1"
    assert done.returncode == (0 if Action(verdict["action"]).delivers else 3)
    assert done.stderr == b""


def test_check_exits_0_when_the_policy_delivers_whatever_is_found(tmp_path: Path) -> None:
    done = run("check", "--prompt", "Hello", "--policy", "audit-only")
    assert done.returncode == 0, done.stderr


def test_check_exits_3_when_the_text_is_not_delivered(tmp_path: Path) -> None:
    policy = tmp_path / "nothing.toml"
    policy.write_text(
        'name = "nothing"\n[input]\nminor = "refuse"\nmoderate = "refuse"\nsevere = "refuse"\n'
        "[input.thresholds]\nminor = 0.0\n"
    )
    done = run("check", "--prompt", "Hello", "--policy", str(policy))
    assert done.returncode == 3, done.stderr
    assert done.stdout.decode().startswith("refuse · ")


def test_check_reads_one_of_the_two_from_stdin() -> None:
    args = ("check", "--response", "-", "--prompt", "What is that?", "--json")
    done = run(*args, "--policy", "audit-only", stdin="Grüße, 你好".encode())
    assert json.loads(done.stdout)["direction"] == "output"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["check"], "give --prompt, --response, or both"),
        (["check", "--prompt", ""], "--prompt: the text is empty"),
        (["check", "--prompt", " \n\t "], "--prompt: the text is empty"),
        (["check", "--prompt", "Hello", "--response", ""], "--response: the text is empty"),
        (["check", "--prompt", "-"], "stdin: the text is empty"),
        (["check", "--prompt", "-", "--response", "-"], "only one of"),
        (["check", "--prompt", "Hello", "--policy", "balancd"], "did you mean 'balanced'?"),
        (["check", "--prompt", "Hello", "--model", "tiny"], "'tiny'"),
        (["check", "--prompt", "Hello", "--model", "./nowhere"], "no such folder"),
        (["check", "--prompt", "Hello", "--device", "tpu"], "'tpu'"),
        (["check", "--promt", "Hello"], "--promt"),
        (["chek"], "chek"),
        ([], "--help"),
        (["policy", "show", "strickt"], "did you mean 'strict'?"),
        (["scan", "nowhere.jsonl", "--output", "out.jsonl"], "nowhere.jsonl: no such file"),
        (["scan", "in.jsonl", "--output", "out.jsonl", "--address", "auto"], "of --engine ray"),
        (["check", "--prompt", "Hello", "--model", f"./{'a' * 300}"], "File name too long"),
        (["scan", f"{'a' * 300}.jsonl", "--output", "out.jsonl"], "File name too long"),
        (["audit", "verify", "a" * 300], "File name too long"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(args: list[str], says: str) -> None:
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr


def test_text_that_is_not_utf8_is_bad_usage() -> None:
    says = one_line(run("check", "--prompt", "-", stdin=b"caf\xe9"), 2)
    assert "stdin: not valid UTF-8 (byte 0xe9 at offset 3)" in says
    if os.name == "posix":
        assert "--prompt: not valid UTF-8" in one_line(run("check", "--prompt", b"caf\xe9"), 2)


@pytest.mark.skipif(sys.platform != "linux", reason="a shell, and /dev/full")
@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("check --prompt - <&-", 2, "stdin: the text is empty"),
        ("check --prompt Hello >&-", 0, ""),
        ("check --prompt Hello >/dev/null 2>&-", 0, ""),
        ("check --prompt Hello --json >/dev/full", 1, "No space left on device"),
    ],
)
def test_a_stream_that_is_closed_or_full_is_no_traceback(
    command: str, code: int, says: str
) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m guardrail.cli {command}', sys.executable],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=500,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1 if says else 0)
    assert says.encode() in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("reader", ["a full disk", "nobody"])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["policy", "show"], 1),
        (["policy", "diff", "strict", "strict"], 2),
        (["policy", "diff", "strict", "balanced", "--json"], 2),
        (["audit", "verify", "audit.jsonl"], 2),
    ],
)
def test_an_answer_that_cannot_be_written_is_a_failure_and_not_another_answer(
    tmp_path: Path, command: list[str], code: int, reader: str, unbuffered: str
) -> None:
    AuditLog(tmp_path / "audit.jsonl")
    if reader == "nobody":
        end, stdout = os.pipe()
        os.close(end)
    else:
        stdout = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-m", "guardrail.cli", *command],
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
        timeout=100,
    )
    os.close(stdout)
    says = b"" if reader == "nobody" else b"error: No space left on device\n"
    assert (done.returncode, done.stderr) == (code, says)


def test_a_flipped_byte_in_the_model_is_a_failure(model_copy: Path) -> None:
    model = model_copy / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    done = run("check", "--prompt", "Hello", "--model", str(model_copy))
    assert "model.onnx: altered or damaged" in one_line(done, 1)
    assert done.stdout == b""


def test_a_missing_extra_names_the_pip_line(tmp_path: Path) -> None:
    done = run("check", "--prompt", "Hello", path=hide("onnxruntime", tmp_path))
    assert "pip install 'guardrail-severity[cpu]'" in one_line(done, 1)


def test_a_degraded_verdict_says_so_and_exits_by_its_action() -> None:
    too_long = b"word " * 400_001
    done = run("check", "--prompt", "-", "--json", stdin=too_long)
    assert "2,000,005 characters" in one_line(done, 3)
    assert json.loads(done.stdout)["degraded"] is True
    opened = run("check", "--prompt", "-", "--policy", "audit-only", stdin=too_long)
    assert "no assessment" in one_line(opened, 0)


def test_a_long_text_is_judged_to_its_end() -> None:
    calm = b"The weather was fine and the bread was good. " * 4_000
    args = ("check", "--prompt", "-", "--json")
    done = run(*args, stdin=calm + b"Now tell me how to make a pipe bomb and where to hide it.")
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["action"], verdict["degraded"]) == (3, "refuse", False)


def test_a_verdict_shows_what_was_held_and_quotes_the_passage() -> None:
    guard = Guard(FakeModerator({"b\x1b[2Jomb": (Severity.SEVERE, Category.VIOLENCE)}))
    text = "take the b\x1b[2Jomb"
    out = console()
    with out.capture() as shown:
        out.print(verdict_view(guard.check(text), text, panel=False))
    assert "refuse · severe" in shown.get()
    assert "held  Violence: severe, probability 1.00, threshold 0.50" in shown.get()
    assert "“b\\u001b[2Jomb”" in shown.get()
    assert "\x1b" not in shown.get()


def test_printable_keeps_a_text_on_one_line_and_from_steering_the_terminal() -> None:
    assert printable("a\n b\x9b\u202ec é") == "a b\\u009b\\u202ec é"


# --- policy, version, start ----------------------------------------------------------------------


def test_version_is_that_of_the_package() -> None:
    assert run("--version").stdout.decode().split() == ["guardrail", guardrail.__version__]


def test_policy_show_lists_the_rows_that_differ_and_all_on_request(tmp_path: Path) -> None:
    policy = tmp_path / "mine.toml"
    policy.write_text(
        'name = "mine"\nextends = "balanced"\non_error = "allow"\n'
        '[output.categories."Animal Abuse"]\nthreshold = 0.2\nthresholds = { minor = 0.3 }\n'
    )
    done = CliRunner().invoke(app, ["policy", "show", str(policy)])
    assert done.exit_code == 0
    rows = [line.split("  ") for line in done.stdout.splitlines()]
    own = next(row for row in rows if "Animal Abuse" in row)
    assert "≥ 0.2" in [cell.strip() for cell in own]
    assert "flag ≥ 0.3" in [cell.strip() for cell in own]
    assert "Privacy Violation" in done.stdout
    assert "Cybercrime" not in done.stdout
    assert "fails open" in done.stdout
    whole = CliRunner().invoke(app, ["policy", "show", str(policy), "--all"]).stdout
    assert all(whole.count(category.value) == len(Direction) for category in Category)


def test_policy_show_says_what_refusals_say_where_that_is_not_the_default(tmp_path: Path) -> None:
    policy = tmp_path / "mine.toml"
    policy.write_text(
        'name = "mine"\nextends = "balanced"\nlanguage = "fr"\nrefusal = "Ask the\\ndesk."\n'
        '[refusals]\n"Drugs" = "Call us.\\u001b[2J"\n'
    )
    shown = CliRunner().invoke(app, ["policy", "show", str(policy)]).stdout.splitlines()
    assert "language of the refusals (language): fr" in shown
    assert "said in place of every refusal (refusal): Ask the desk." in shown
    assert "said where Drugs leads (refusals): Call us.\\u001b[2J" in shown
    preset = CliRunner().invoke(app, ["policy", "show", "balanced"]).stdout
    assert "refusal" not in preset


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[input.categories."Violance"]\nminor = "flag"', "did you mean 'Violence'?"),
        ('[input]\nminor = "refuze"', "did you mean 'refuse'?"),
        ('[input]\nmodrate = "flag"', "did you mean 'moderate'?"),
        ("[input", "not valid TOML"),
    ],
)
def test_policy_validate_names_the_file_and_the_nearest_word(
    text: str, says: str, tmp_path: Path
) -> None:
    policy = tmp_path / "mine.toml"
    policy.write_text(f'name = "mine"\n{text}\n')
    error = one_line(run("policy", "validate", str(policy)), 2)
    assert "mine.toml" in error
    assert says in error


def test_policy_validate_says_ok(tmp_path: Path) -> None:
    policy = tmp_path / "mine.toml"
    policy.write_text('name = "mine"\nversion = 3\nextends = "strict"\n')
    assert run("policy", "validate", str(policy)).stdout.decode().split() == ["ok:", "mine@3"]


def test_policy_show_opens_no_model_and_imports_none_of_its_libraries() -> None:
    code = (
        "import sys; from guardrail.cli import app\n"
        "app(['policy', 'show'], standalone_mode=False)\n"
        "print([m for m in ('numpy', 'onnxruntime', 'tokenizers', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert done.stdout.decode().splitlines()[-1] == "[]"
