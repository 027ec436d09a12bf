"""Batches of a training run: all texts once, and answers to one prompt together if asked for."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")

from guardrail.encoding import Window  # noqa: E402
from training.batching import Encoded, batches, tensors  # noqa: E402
from training.data import Example, targets  # noqa: E402
from training.losses import ranking  # noqa: E402


@dataclass
class How:
    tokens_per_batch: int = 200
    random_window: float = 0.0
    prefix: float = 0.0
    in_prompt: float = 0.0


def encoded(example: Example, length: int) -> Encoded:
    ids = [1] * length
    return Encoded(example, [Window(ids, [0] * length, 0, length)], *targets(example))


def rows() -> list[Encoded]:
    """Forty prompts with two to four answers of any length; of each third prompt all answers are
    harmless, of each fourth text alone nothing but its harm is known."""
    rng = random.Random(0)
    made = []
    for prompt in range(40):
        for answer in range(2 + prompt % 3):
            severity = 0 if prompt % 3 == 0 else answer
            example = Example(
                f"Prompt {prompt}?", f"answer {answer}", "s", severity > 0, severity, []
            )
            made.append(encoded(example, rng.randint(5, 60)))
    made += [encoded(Example(f"Prompt {n}?", None, "s", True), 9) for n in range(0, 40, 4)]
    rng.shuffle(made)
    return made


@pytest.mark.parametrize("in_prompt", [0.0, 0.3])
def test_an_epoch_has_each_text_once_in_batches_of_the_size_asked_for(in_prompt: float) -> None:
    texts = rows()
    seen: list[int] = []
    for batch, windows in batches(texts, How(in_prompt=in_prompt), random.Random(1)):
        longest = max(len(window.ids) for window in windows)
        assert longest * len(batch) <= 200 + 8 * len(batch)  # lengths are told apart by eights
        seen += [id(row) for row in batch]
    assert sorted(seen) == sorted(map(id, texts))


def test_answers_to_one_prompt_that_differ_in_severity_come_in_one_batch() -> None:
    where = defaultdict(set)
    order = batches(rows(), How(tokens_per_batch=300, in_prompt=0.3), random.Random(1))
    for number, (batch, _) in enumerate(order):
        for row in batch:
            if row.example.response is not None:
                where[row.example.prompt].add(number)
    together = {prompt for prompt, numbers in where.items() if len(numbers) == 1}
    assert {f"Prompt {n}?" for n in range(40) if n % 3} <= together


def test_more_answers_than_a_batch_holds_are_spread_so_that_each_part_has_its_pairs() -> None:
    texts = [
        encoded(Example("Why?", f"answer {n}", "s", n % 2 == 1, 3 * (n % 2), []), 50)
        for n in range(12)
    ]
    for batch, _ in batches(texts, How(in_prompt=0.3), random.Random(1)):
        assert len(batch) <= 4
        assert {row.example.severity for row in batch} == {0, 3}


def test_within_a_prompt_only_answers_to_it_are_compared() -> None:
    given = [
        ("Why?", "bad", 2), ("why", "good", 0), ("How?", "bad", 3), ("How?", None, 0),
    ]  # fmt: skip
    texts = [encoded(Example(p, r, "s", s > 0, s, []), 9) for p, r, s in given]
    batch = tensors(texts, [row.windows[0] for row in texts], pad_id=0)
    severity = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0], [5.0, 5.0, 5.0], [4.0, 0.0, 0.0]])
    loss = ranking(severity, batch["severity"], torch.ones(4), batch["prompt"])
    gap = severity[0].sum() - severity[1].sum()
    assert loss.item() == pytest.approx(torch.nn.functional.softplus(-gap).item())
