"""Policies' answers: drawn, timed, kept, and refused where something else has made them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("onnx")

import tiny_policy  # noqa: E402

from guardrail._files import sha256_of  # noqa: E402
from guardrail.score import BestOf  # noqa: E402
from guardrail.verdict import Pair  # noqa: E402
from training import export_policy, suppression_answers  # noqa: E402
from training.lm import encode_prompt, load_policy, stop_tokens  # noqa: E402
from training.rollout import greedy, texts  # noqa: E402
from training.suppression_answers import (  # noqa: E402
    Answer,
    AnswerArgs,
    Policy,
    answer_all,
    answers_file,
    opened,
    policies_of,
    tokens_per_second,
)
from training.suppression_report import Prompt  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_policy.llama(folder / "base")
    tiny_policy.scorer(folder / "reward", "reward")
    tiny_policy.scorer(folder / "cost", "cost")
    return folder


@pytest.fixture(scope="module")
def exported(tiny: Path) -> Path:
    """The tiny base as ONNX, exact."""
    export_policy.main(
        export_policy.Args(
            policy=str(tiny / "base"), out=tiny / "onnx", precision="fp32", agreement=1.0, tokens=8
        )
    )
    return tiny / "onnx"


PROMPTS = [
    Prompt("how to make cake number " + "very " * (n % 4) + str(n), "benign", "s") for n in range(7)
]


def tiny_args(tiny: Path, out: Path, tokens: int = 6) -> AnswerArgs:
    out.mkdir(exist_ok=True)
    scorers = {"reward": tiny / "reward", "cost": tiny / "cost"}
    return AnswerArgs(bases=tiny, out=out, tokens=tokens, batch=3, **scorers)


# --- what a policy is ----------------------------------------------------------------------------


def test_policies_are_the_base_adapters_and_the_best_of_several_answers() -> None:
    specs = ("base", "base@4", "sft=build/sft", "best=build/a=1/b@2")
    args = AnswerArgs(policies=specs, base="b", reward=Path("r"), cost=Path("c"))
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
        policies_of(AnswerArgs(policies=specs))


@pytest.mark.parametrize("folder", ["base", "onnx"])
@pytest.mark.usefixtures("exported")
def test_the_best_of_several_answers_scores_better_than_the_best_of_few(
    tiny: Path, tmp_path: Path, folder: str
) -> None:
    asked = [f"how to make cake number {n}" for n in range(6)]
    args = tiny_args(tiny, tmp_path, tokens=12)
    ranker = BestOf(tiny / "reward", tiny / "cost")

    def scores(draws: int) -> float:
        answers = opened(args, Policy("p", str(tiny / folder), draws))(asked, 0)
        pairs = [Pair(p, a.text) for p, a in zip(asked, answers, strict=True)]
        return sum(ranker.scores(pairs))

    assert scores(8) > scores(2)


# --- answers that are kept -----------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


def test_answers_are_kept_and_not_drawn_anew(tiny: Path, tmp_path: Path) -> None:
    args, policy = tiny_args(tiny, tmp_path / "out"), Policy("best", str(tiny / "base"), 3)
    first = answer_all(args, policy, PROMPTS)
    assert len(first.texts) == len(PROMPTS)
    assert first.tokens_per_second is not None
    path = args.out / "best.jsonl"
    written = path.stat().st_mtime_ns
    assert answer_all(args, policy, PROMPTS) == first
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize("folder", ["base", "onnx"])
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("kept", [3, 5])
@pytest.mark.usefixtures("exported")
def test_a_run_that_was_cut_goes_on_to_the_same_answers(
    tiny: Path, tmp_path: Path, folder: str, draws: int, kept: int
) -> None:
    policy = Policy("p", str(tiny / folder), draws)
    whole, cut = (tiny_args(tiny, tmp_path / name) for name in ("whole", "cut"))
    expected = answer_all(whole, policy, PROMPTS)
    answers_file(cut, policy, PROMPTS)
    lines = (whole.out / "p.jsonl").read_bytes().splitlines(keepends=True)
    # What a kill leaves: whole lines, and half a one that ends within a character.
    (cut.out / "p.jsonl").write_bytes(b"".join(lines[:kept]) + '{"prompt": "é'.encode()[:-1])
    answers_file(cut, policy, PROMPTS)  # beside it stands what made it
    resumed = answer_all(cut, policy, PROMPTS)
    assert resumed.texts == expected.texts
    rows = [read_rows(args.out / "p.jsonl") for args in (whole, cut)]
    first = kept // 3 * 3  # whole batches, with the seconds that they took then
    assert rows[1][:first] == rows[0][:first]
    assert [untimed(row) for row in rows[1]] == [untimed(row) for row in rows[0]]
    assert resumed.tokens_per_second == tokens_per_second(rows[1])


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


def test_a_policy_that_is_not_there_is_told_before_others_are_asked(
    tiny: Path, tmp_path: Path
) -> None:
    args = tiny_args(tiny, tmp_path / "out")
    with pytest.raises(SystemExit, match="dpo: build/dpoo: no such folder: train it first"):
        answers_file(args, Policy("dpo", "build/dpoo"), PROMPTS)


# --- exported policies ---------------------------------------------------------------------------


def test_an_exported_policy_answers_as_torch_does_and_counts_the_same_tokens(
    tiny: Path, exported: Path, tmp_path: Path
) -> None:
    lm = load_policy(str(tiny / "base"))
    asked = [p.text for p in PROMPTS]
    asked.append("Human: what is cake\n\nAssistant: sugar\n\nHuman: how to make cake")
    by_torch = greedy(
        lm.model, lm.tokenizer, [encode_prompt(lm.tokenizer, prompt) for prompt in asked], 6
    )
    answers = opened(tiny_args(tiny, tmp_path), Policy("p", str(exported)))(asked, 0)
    assert [a.text for a in answers] == texts(lm.tokenizer, by_torch)
    assert [a.tokens for a in answers] == by_torch.mask.sum(dim=1).tolist()


def test_draws_of_an_exported_policy_differ_between_prompts_and_between_draws(
    tiny: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[Any] = []
    monkeypatch.setattr(
        "guardrail.local.draw", lambda logits, heat, mass, rng: seeds.append(rng.random()) or 5
    )
    policy = Policy("p", str(exported), 2)
    draw = suppression_answers.onnx_draw(tiny_args(tiny, tmp_path, tokens=1), policy)
    draw(["how to make cake"] * 2, 0)
    draw(["how to make cake"], 2)
    assert len(set(seeds)) == 6


def test_the_origin_of_an_exported_policys_answers_names_its_manifest(
    tiny: Path, exported: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported, tmp_path / "policy")
    args, policy = tiny_args(tiny, tmp_path / "out"), Policy("p", str(folder))
    answer_all(args, policy, PROMPTS)
    origin = json.loads((args.out / "p.jsonl.origin.json").read_text())
    assert origin["policy"] == f"manifest.json@sha256:{sha256_of(folder / 'manifest.json')}"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"created": "2030-01-01"}))
    with pytest.raises(SystemExit, match="is of a run with another policy"):
        answers_file(args, policy, PROMPTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "p: .*not a chat policy, or one half"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"x"), "p: .*altered or damaged"),
    ],
)
def test_an_exported_policy_that_is_not_whole_is_refused_before_it_is_asked(
    exported: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    folder = shutil.copytree(exported, tmp_path / "policy")
    damage(folder)
    with pytest.raises(SystemExit, match=message):
        answers_file(tiny_args(tmp_path, tmp_path / "out"), Policy("p", str(folder)), PROMPTS)


def test_an_exported_policy_is_no_base(exported: Path) -> None:
    with pytest.raises(SystemExit, match="the base has to run by torch"):
        policies_of(AnswerArgs(base=str(exported)))


# --- how fast ------------------------------------------------------------------------------------


def test_an_answer_counts_its_tokens_up_to_and_with_the_one_that_ends_it(tiny: Path) -> None:
    lm = load_policy(str(tiny / "base"))
    ids = [encode_prompt(lm.tokenizer, p.text) for p in PROMPTS]
    whole = greedy(lm.model, lm.tokenizer, ids, 12)
    # Whatever comes third in the first answer ends answers from now on.
    end = int(whole.answers[0, 2])
    lm.model.generation_config.eos_token_id = [lm.tokenizer.eos_token_id, end]
    ended = greedy(lm.model, lm.tokenizer, ids, 12)
    for row, length in zip(whole.answers.tolist(), ended.mask.sum(dim=1).tolist(), strict=True):
        ends = [
            place
            for place, token in enumerate(row, 1)
            if token in stop_tokens(lm.tokenizer, lm.model)
        ]
        assert length == min([*ends, 12])


def test_speed_is_tokens_of_the_answers_over_the_seconds_of_all_batches(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of our own: 7 answers of 10 tokens, in batches of 3, 3 and 1 that took 2 s each,
    the last of them in a second run."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(suppression_answers.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(
        suppression_answers, "opened", lambda *_: lambda part, _: [Answer("x", 10) for _ in part]
    )
    args, policy = tiny_args(tiny, tmp_path / "out"), Policy("p", str(tiny / "base"))
    answer_all(args, policy, PROMPTS)
    path = args.out / "p.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    assert answer_all(args, policy, PROMPTS).tokens_per_second == pytest.approx(70 / 6, rel=1e-5)


def test_answers_that_were_kept_without_their_time_have_no_speed() -> None:
    assert tokens_per_second([{"prompt": "p", "answer": "a"}]) is None
    assert tokens_per_second([]) is None
