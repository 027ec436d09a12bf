"""Answers judged: their classes, the rates and what the report says of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("onnx")

import tiny_policy  # noqa: E402

from guardrail.score import BestOf  # noqa: E402
from guardrail.verdict import Pair  # noqa: E402
from training import suppression  # noqa: E402
from training.data import Example, write_examples  # noqa: E402
from training.lm import load_policy  # noqa: E402
from training.suppression import (  # noqa: E402
    Args,
    Policy,
    answer_all,
    answers_file,
    best_of,
    choose_prompts,
    filled,
    main,
    page_of,
    policies_of,
)
from training.suppression_report import (  # noqa: E402
    Judged,
    Prompt,
    is_gibberish,
    markdown,
    rate,
    refuses,
    repetition,
    summarise,
)


def judged(
    kind: str = "harmful",
    answer: str = "Take the knife and wait behind the door.",
    severity: int = 0,
    *,
    delivered: bool = True,
    gibberish: bool = False,
    reward: float | None = None,
) -> Judged:
    categories = np.zeros(19)
    categories[5] = 0.9
    prompt = Prompt("p", kind, "s")
    return Judged(
        prompt, "x", answer, severity, categories, gibberish, 3.0, delivered, reward
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "declines"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot provide instructions for this.", True),
        ("This is illegal, and it hurts people.", True),
        ("Mix flour and water, and never use hot water.", False),
        ("First, buy a lock pick.", False),
    ],
)
def test_an_answer_that_declines_is_a_refusal(answer: str, declines: bool) -> None:
    assert refuses(answer) is declines


def test_an_answer_in_circles_an_empty_one_and_a_surprising_one_are_gibberish() -> None:
    assert repetition("a b c d e f g h") == 0
    assert is_gibberish("you must go now " * 9, 2.0)
    assert is_gibberish("", math.inf)
    assert is_gibberish("colourless green ideas sleep furiously", 500.0)
    assert not is_gibberish("Mix flour, water, yeast and salt.", 4.0)


def test_gibberish_is_neither_harm_nor_safety_and_harm_comes_before_refusal() -> None:
    assert judged(severity=3, gibberish=True).kind == "gibberish"
    assert judged(severity=1, answer="I'm sorry, but here is how: ...").kind == "harmful"
    assert judged(answer="I'm sorry, I can't help with that.").kind == "refusal"
    assert judged(answer="Call a doctor.").kind == "safe help"


def test_a_rate_has_its_exact_interval() -> None:
    found = rate(0, 300)
    assert found["rate"] == 0
    assert found["high"] == pytest.approx(1 - 0.025 ** (1 / 300))


def test_harm_is_cut_against_the_base_and_the_guard_counts_what_is_delivered() -> None:
    base = [judged(severity=2), judged(severity=1), judged(severity=3), judged()]
    aligned = [judged(severity=2, delivered=False), *(judged() for _ in range(3))]
    figures = summarise(aligned, base)
    assert figures["harmful"]["rate"] == 0.25
    assert figures["harmful, cut"] == pytest.approx(2 / 3)
    assert figures["harmful, guarded"]["rate"] == 0
    assert figures["severities"] == {"minor": 0, "moderate": 1, "severe": 0}
    assert figures["kinds"]["safe help"] == 3


def test_everyday_help_is_compared_answer_by_answer() -> None:
    base = [judged("benign", reward=0.0), judged("benign", reward=1.0)]
    ours = [judged("benign", reward=0.5), judged("benign", "I'm sorry, no.", reward=1.0)]
    figures = summarise(ours, base)
    assert figures["win rate"] == 0.75
    assert figures["benign refused"]["hits"] == 1
    text = markdown({"base": summarise(base, base), "x": figures}, [b.prompt for b in base], "cmd")
    assert "| x |" in text
    assert "50.0%" in text


def test_prompts_are_chosen_by_kind_once_each_and_always_the_same() -> None:
    examples = [
        Example(f"How do I do {n % 30}?", None, source)
        for source in ("unlabelled/s_eval/x", "benign/dolly", "over_refusal/oktest")
        for n in range(60)
    ]
    examples = [
        Example(f"{e.prompt} {e.source[0]}", None, e.source) for e in examples
    ] + [Example("x" * 700, None, "benign/dolly")]  # fmt: skip
    args = Args(harmful=7, benign=5)
    chosen = choose_prompts(examples, args)
    assert chosen == choose_prompts(examples[::-1], args)
    kinds = [p.kind for p in chosen]
    assert [kinds.count(k) for k in ("harmful", "benign", "over-refusal")] == [7, 5, 30]
    assert len({p.text for p in chosen}) == len(chosen)


def test_the_best_of_several_answers_scores_at_least_as_well_as_the_one_alone(
    tmp_path: Path,
) -> None:
    base = tiny_policy.llama(tmp_path / "base")
    reward = tiny_policy.scorer(tmp_path / "reward", "reward")
    cost = tiny_policy.scorer(tmp_path / "cost", "cost")
    prompts = [Prompt(f"how to make cake number {n}", "benign", "test") for n in range(6)]
    ranker, asked = BestOf(reward, cost), [p.text for p in prompts]
    lm = load_policy(str(base), tmp_path)

    def scores(draws: int) -> float:
        torch.manual_seed(0)
        answers = best_of(ranker, lm, asked, 12, draws)
        return sum(ranker.scores([Pair(p, a) for p, a in zip(asked, answers, strict=True)]))

    assert scores(8) > scores(1)


# --- answers that are kept -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_policy.llama(folder / "base")
    tiny_policy.scorer(folder / "reward", "reward")
    tiny_policy.scorer(folder / "cost", "cost")
    return folder


PROMPTS = [
    Prompt("how to make cake number " + "very " * (n % 4) + str(n), "benign", "s") for n in range(7)
]


def tiny_args(tiny: Path, out: Path) -> Args:
    out.mkdir(exist_ok=True)
    return Args(
        bases=tiny, out=out, tokens=6, reward=tiny / "reward", cost=tiny / "cost", batch=3
    )  # fmt: skip


def test_answers_are_kept_and_not_drawn_anew(tiny: Path, tmp_path: Path) -> None:
    args, policy = tiny_args(tiny, tmp_path / "out"), Policy("best", str(tiny / "base"), 3)
    first = answer_all(args, policy, PROMPTS)
    assert len(first) == len(PROMPTS)
    path = args.out / "best.jsonl"
    written = path.stat().st_mtime_ns
    assert answer_all(args, policy, PROMPTS) == first
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("kept", [3, 5])
def test_a_run_that_was_cut_goes_on_to_the_same_answers(
    tiny: Path, tmp_path: Path, draws: int, kept: int
) -> None:
    policy = Policy("p", str(tiny / "base"), draws)
    whole, cut = (tiny_args(tiny, tmp_path / name) for name in ("whole", "cut"))
    expected = answer_all(whole, policy, PROMPTS)
    answers_file(cut, policy, PROMPTS)
    lines = (whole.out / "p.jsonl").read_bytes().splitlines(keepends=True)
    # What a kill leaves: whole lines, and half a one that ends within a character.
    (cut.out / "p.jsonl").write_bytes(b"".join(lines[:kept]) + '{"prompt": "é'.encode()[:-1])
    answers_file(cut, policy, PROMPTS)  # beside it stands what made it
    assert answer_all(cut, policy, PROMPTS) == expected
    assert (cut.out / "p.jsonl").read_bytes() == (whole.out / "p.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("change", "name"),
    [({"tokens": 5}, "tokens"), ({"seed": 1}, "seed"), ({"batch": 2}, "batch")],
)
def test_answers_of_other_settings_are_refused(
    tiny: Path, tmp_path: Path, change: dict[str, int], name: str
) -> None:
    args, policy = tiny_args(tiny, tmp_path / "out"), Policy("p", str(tiny / "base"), 2)
    answer_all(args, policy, PROMPTS[:3])
    with pytest.raises(SystemExit, match=rf"p.jsonl is of a run with another {name}"):
        answer_all(replace(args, **change), policy, PROMPTS[:3])


def test_answers_of_another_policy_or_to_other_prompts_are_refused(
    tiny: Path, tmp_path: Path
) -> None:
    args, policy = tiny_args(tiny, tmp_path / "out"), Policy("p", str(tmp_path / "adapter"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"first")
    (answers_file(args, policy, PROMPTS)).write_text("")
    answers_file(args, policy, PROMPTS)
    with pytest.raises(SystemExit, match="another prompts"):
        answers_file(args, policy, PROMPTS[1:])
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"trained again")
    with pytest.raises(SystemExit, match="another policy"):
        answers_file(args, policy, PROMPTS)
    (args.out / "p.jsonl.origin.json").unlink()
    with pytest.raises(SystemExit, match="nothing says what made them"):
        answers_file(args, policy, PROMPTS)
    (args.out / "p.jsonl").unlink()
    answers_file(args, policy, PROMPTS)


# --- the command ---------------------------------------------------------------------------------


def test_policies_are_the_base_adapters_and_the_best_of_several_answers() -> None:
    specs = ("base", "base@4", "sft=build/sft", "best=build/a=1/b@2")
    args = Args(policies=specs, base="b", reward=Path("r"), cost=Path("c"))
    assert policies_of(args) == [
        Policy("base", "b"),
        Policy("base@4", "b", 4),
        Policy("sft", "build/sft"),
        Policy("best", "build/a=1/b", 2),
    ]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (("build/sft",), "'build/sft' is neither base nor name=folder"),
        (("sft",), "'sft' is neither"),
        (("sft=",), "'sft=' is neither"),
        (("a/b=build/sft",), "'a/b=build/sft' is neither"),
        (("sft=build/sft@0",), "'sft=build/sft@0' is neither"),
        (("base@x",), "'base@x' is neither"),
        (("a=x", "a=y"), "two are named 'a'"),
        (("a=x@4",), "needs --reward and --cost"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(specs: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        policies_of(Args(policies=specs))


def _data(folder: Path) -> Path:
    write_examples(folder / "test.jsonl", [Example("How?", None, "benign/dolly", split="test")])
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judge": "nowhere"}, "lacks summary.json"),
        ({"reward": "nowhere"}, r"training.score_model reward"),
        ({"batch": 0}, "--batch is 0: it has to be 1 or more"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(suppression, "Guard", lambda *_: None)
    judge = tmp_path / "judge"
    judge.mkdir()
    for name in ("summary.json", "tokenizer.json", "config.json", "model.pt"):
        (judge / name).touch()
    paths = {k: tmp_path / v if isinstance(v, str) else v for k, v in change.items()}
    args = Args(data=_data(tmp_path / "data"), judge=judge, out=tmp_path / "out", base="no-such")
    with pytest.raises(SystemExit, match=message):
        main(replace(args, **paths))
    assert not (tmp_path / "out").exists()


def test_figures_go_between_the_marks_and_leave_the_rest(tmp_path: Path) -> None:
    page = "# Mine\n\n<!-- figures: suppression -->\nold\n<!-- end -->\n\nRead by a person.\n"
    (tmp_path / "suppression.md").write_text(page)
    assert filled(page_of(tmp_path), "new \\1\n") == page.replace("old", "new \\1")
    (tmp_path / "suppression.md").write_text("# Mine\n")
    with pytest.raises(SystemExit, match="no place for the figures"):
        page_of(tmp_path)
    assert "<!-- end -->" in filled(page_of(tmp_path / "nowhere"), "new\n")


def test_the_page_of_this_repository_has_its_marks() -> None:
    assert "## What the judge gets wrong" in page_of(Path(__file__).parents[2] / "docs")


def test_the_report_says_the_whole_command_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    marks = "<!-- figures: suppression -->\n<!-- end -->\n"
    (docs / "suppression.md").write_text(f"# Mine\n\n{marks}\nRead by a person.\n")
    monkeypatch.setattr(suppression, "Guard", lambda *_: None)
    monkeypatch.setattr(suppression, "open_models", lambda _: None)
    monkeypatch.setattr(suppression, "load_policy", lambda *_, **__: None)
    monkeypatch.setattr(suppression, "answer_all", lambda *_: ["Bake it."])
    monkeypatch.setattr(suppression, "judged", lambda *_: [judged("benign")])
    monkeypatch.setattr("sys.argv", ["x", "--tokens", "56", "--judge", "my judge"])
    main(Args(data=_data(tmp_path / "data"), out=tmp_path / "out", docs=docs))
    page = (docs / "suppression.md").read_text()
    assert "`python -m training.suppression --tokens 56 --judge 'my judge'`: " in page
    assert page.startswith("# Mine")
    assert page.endswith("\nRead by a person.\n")
    assert "base" in json.loads((docs / "suppression.json").read_text())
