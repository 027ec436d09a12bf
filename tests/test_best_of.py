"""Best-of-n in `regenerate`: several answers, each judged, the best by reward - lambda x cost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the tiny models are made with the training extra")
pytest.importorskip("onnxruntime")

import policy_kit
from score_kit import scorer_folder

from guardrail import Category, ChatResult, Guard, GuardedChat, Pair, Policy, Severity
from guardrail.chat_model import Message
from guardrail.local import OnnxChat
from guardrail.score import BestOf, OnnxScorer
from guardrail.stream import StreamConfig
from guardrail.testing import FakeModerator, leaked_chars

WORDS = {"bomb": (Severity.SEVERE, Category.VIOLENCE)}
POLICY = Policy.parse('name = "again"\n[output]\nsevere = "regenerate"\n[input]\nsevere = "refuse"')
GATHERS = StreamConfig(first=200)
NAN = math.nan


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A reward of 2 for `good` and 1 for `filler`; a cost of 1 for `good` and 0.5 for `bad`."""
    root = tmp_path_factory.mktemp("scores")
    reward = scorer_folder(root / "reward", "reward", weights=[0, 0, 0, 0, 2, 0, 1, NAN])
    return reward, scorer_folder(root / "cost", "cost", weights=[0, 0, 0, 0, 1, 0.5, 0, 0])


class Answers:
    """A callable model that gives its answers in turn, in pieces."""

    def __init__(self, *answers: str) -> None:
        self.answers = answers
        self.asked: list[list[Message]] = []

    def __call__(self, messages: list[Message]) -> Iterator[str]:
        self.asked.append(messages)
        return iter(self.answers[len(self.asked) - 1].partition(" "))


def ask(chat: GuardedChat, how: str) -> tuple[list[str], ChatResult]:
    if how == "complete":
        result = chat.complete("hi")
        return [result.text], result
    if how == "stream":
        stream = chat.stream("hi")
        return list(stream), stream.result

    async def run() -> tuple[list[str], ChatResult]:
        if how == "acomplete":
            result = await chat.acomplete("hi")
            return [result.text], result
        astream = chat.astream("hi")
        return [text async for text in astream], astream.result

    return asyncio.run(run())


doors = pytest.mark.parametrize("how", ["complete", "stream", "acomplete", "astream"])


def chat_of(model: Any, best_of: BestOf, tries: int, words: Any = WORDS) -> GuardedChat:
    guard = Guard(FakeModerator(words), POLICY)
    return GuardedChat(model, guard, regenerate_tries=tries, best_of=best_of, stream_config=GATHERS)


@doors
@pytest.mark.parametrize(
    ("harm_weight", "best"),
    [(0, "good good"), (1, "good good"), (1.5, "filler"), (10, "filler")],
)
def test_the_best_by_reward_and_cost_of_the_answers_that_may_go_out_is_given(
    folders: tuple[Path, Path], how: str, harm_weight: float, best: str
) -> None:
    model = Answers("a bomb", "filler", "good good good bomb", "good good", "bad")
    pieces, result = ask(chat_of(model, BestOf(*folders, harm_weight=harm_weight), 4), how)
    assert (result.text, result.finish_reason, result.blocked) == (best, "stop", False)
    assert "".join(pieces) == best
    assert result.output_verdict is not None
    assert result.output_verdict.delivers
    assert len(model.asked) == 5
    assert model.asked[1][0]["role"] == "system"  # the safety instruction
    assert model.asked[1:] == [model.asked[1]] * 4


@doors
def test_when_no_answer_may_go_out_it_is_a_refusal(folders: tuple[Path, Path], how: str) -> None:
    model = Answers("a bomb", "good bomb", "bomb good")
    pieces, result = ask(chat_of(model, BestOf(*folders), 2), how)
    assert result.blocked
    assert leaked_chars(pieces, WORDS) == 0
    assert len(model.asked) == 3


def test_an_answer_that_is_delivered_at_once_is_not_compared(folders: tuple[Path, Path]) -> None:
    model = Answers("filler")
    assert chat_of(model, BestOf(*folders), 4).complete("hi").text == "filler"
    assert len(model.asked) == 1


@doors
def test_answers_that_cannot_be_compared_are_given_in_order_and_the_log_says_so(
    folders: tuple[Path, Path], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Answers("a bomb", "bad", "broken")
    assert ask(chat_of(model, BestOf(*folders), 2), how)[1].text == "bad"
    assert "2 answers were not compared, the first is given: bag" in caplog.text


def test_a_masked_answer_is_compared_as_it_would_go_out(folders: tuple[Path, Path]) -> None:
    seen: list[Pair] = []

    class Watched(OnnxScorer):
        def score(self, pairs: Sequence[Any]) -> Any:
            seen.extend(pairs)
            return super().score(pairs)

    policy = Policy.parse('name = "t"\n[output]\nsevere = "regenerate"\nmoderate = "redact"')
    words = {**WORDS, "0199": (Severity.MODERATE, Category.PRIVACY_VIOLATION)}
    model = Answers("a bomb", "good 0199", "filler")
    chat = GuardedChat(
        model,
        Guard(FakeModerator(words), policy),
        best_of=BestOf(Watched(folders[0]), folders[1]),
        stream_config=GATHERS,
    )
    assert chat.complete("hi").text == "good [redacted]"
    assert seen == [Pair("hi", "good [redacted]"), Pair("hi", "filler")]


@doors
def test_a_seeded_local_model_draws_another_answer_each_time(
    tmp_path: Path, folders: tuple[Path, Path], how: str
) -> None:
    folder = policy_kit.random_policy(tmp_path / "noise")
    local = OnnxChat(folder, temperature=1.5, seed=7, max_new_tokens=12)
    draws = [local.redrawn(n).complete("hi").text for n in (1, 2, 3)]
    assert len({local.complete("hi").text, *draws}) == 4
    assert draws == [local.redrawn(n).complete("hi").text for n in (1, 2, 3)]

    # The first answer is what the policy regenerates; of its redrawn ones any may be the best.
    again: list[tuple[str, str]] = []

    class Rewards(OnnxScorer):
        def score(self, pairs: Sequence[Any]) -> Any:
            again.extend((pair.prompt, pair.response) for pair in pairs)
            return np.arange(len(pairs), dtype=float)  # the last is the best

    words = {local.complete("hi").text: (Severity.SEVERE, Category.VIOLENCE)}
    best_of = BestOf(Rewards(folders[0]), folders[1])
    _, result = ask(chat_of(local, best_of, 3, words), how)
    assert len({text for _, text in again}) == 3
    assert result.text == again[-1][1]
    assert not result.blocked


def test_regenerate_without_best_of_redraws_too(tmp_path: Path) -> None:
    folder = policy_kit.random_policy(tmp_path / "noise")
    local = OnnxChat(folder, temperature=1.5, seed=7, max_new_tokens=12)
    first = local.complete("hi").text
    guard = Guard(FakeModerator({first: (Severity.SEVERE, Category.VIOLENCE)}), POLICY)
    result = GuardedChat(local, guard, stream_config=GATHERS).complete("hi")
    assert not result.blocked
    assert result.text != first


def test_an_unseeded_model_needs_no_other_seed(tmp_path: Path) -> None:
    folder = policy_kit.random_policy(tmp_path / "noise")
    local = OnnxChat(folder, temperature=1.5, max_new_tokens=12)
    assert local.redrawn(1).complete("hi") != local.redrawn(1).complete("hi")


def test_score_models_in_each_others_place_are_refused(folders: tuple[Path, Path]) -> None:
    reward, cost = folders
    with pytest.raises(ValueError, match="needs a reward model here, not a cost model"):
        BestOf(cost, reward)
    with pytest.raises(ValueError, match="needs a cost model here, not a reward model"):
        BestOf(OnnxScorer(reward), OnnxScorer(reward))


@pytest.mark.parametrize("harm_weight", [-1, NAN, math.inf])
def test_a_weight_that_makes_no_sense_is_refused(
    folders: tuple[Path, Path], harm_weight: float
) -> None:
    with pytest.raises(ValueError, match="harm_weight must be 0 or more"):
        BestOf(*folders, harm_weight=harm_weight)
