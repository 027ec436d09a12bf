"""Losses against hand-computed values and against what they promise."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from training.losses import (  # noqa: E402
    bernoulli_divergence,
    masked_bce,
    monotone_logits,
    ranking,
)

finite = st.floats(-30, 30, width=32)


@given(st.lists(finite, min_size=3, max_size=3))
def test_severity_logits_never_cross(raw: list[float]) -> None:
    out = monotone_logits(torch.tensor([raw]))[0].tolist()
    assert out[0] == pytest.approx(raw[0])
    assert out[0] >= out[1] >= out[2]


def test_severity_steps_are_softplus_of_what_the_head_says() -> None:
    out = monotone_logits(torch.tensor([[2.0, 0.0, 1.0]]))[0].tolist()
    assert out == pytest.approx(
        [2.0, 2 - math.log(2), 2 - math.log(2) - math.log1p(math.e)], abs=1e-5
    )


def test_masked_bce_is_the_sum_over_known_labels_averaged_over_texts() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    loss = masked_bce(logits, target, mask, torch.ones(2))
    expected = (math.log(2) + math.log1p(math.e) + math.log(2)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_unknown_labels_give_no_gradient() -> None:
    logits = torch.tensor([[1.0, -1.0], [3.0, 2.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    masked_bce(logits, torch.zeros(2, 2), mask, torch.ones(2)).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] != 0
    assert logits.grad[0, 1] == 0
    assert torch.equal(logits.grad[1], torch.zeros(2))


def test_a_batch_without_any_label_costs_nothing() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = masked_bce(logits, torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))
    loss.backward()
    assert loss.item() == 0


def test_weights_scale_a_text_against_its_neighbours() -> None:
    logits, target, mask = torch.tensor([[0.0], [4.0]]), torch.zeros(2, 1), torch.ones(2, 1)
    loss = masked_bce(logits, target, mask, torch.tensor([3.0, 1.0]))
    assert loss.item() == pytest.approx((3 * math.log(2) + math.log1p(math.exp(4))) / 4, rel=1e-5)


def test_focal_labels_count_by_how_wrong_the_model_is() -> None:
    logits, ones = torch.tensor([[0.0, 3.0]]), torch.ones(1, 2)
    right = 1 / (1 + math.exp(-3))
    for target in (1.0, 0.6):
        losses = [
            math.log(2),
            target * math.log1p(math.exp(-3)) + (1 - target) * math.log1p(math.exp(3)),
        ]
        expected = losses[0] * abs(target - 0.5) ** 2 + losses[1] * abs(target - right) ** 2
        loss = masked_bce(logits, ones * target, ones, torch.ones(1), focal=2.0)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_labels_that_a_text_lacks_count_by_an_exponent_of_their_own() -> None:
    logits, target, ones = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2)
    wrong = 1 / (1 + math.exp(-2))
    expected = math.log(2) + math.log1p(math.exp(2)) * wrong**3
    loss = masked_bce(logits, target, ones, torch.ones(1), focal=0.0, absent=3.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_divergence_of_two_passes_is_that_of_their_bernoullis() -> None:
    one, other = torch.tensor([[1.0], [0.0]]), torch.tensor([[-0.5], [0.0]])
    p, q = (torch.distributions.Bernoulli(logits=z[0]) for z in (one, other))
    kl = torch.distributions.kl_divergence
    expected = (kl(p, q) + kl(q, p)).item() / 2 / 2  # the second text has none
    assert bernoulli_divergence(one, other).item() == pytest.approx(expected, rel=1e-5)


def test_ranking_is_the_loss_of_each_pair_that_differs_in_severity() -> None:
    severity = torch.tensor([[2.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.0], [9.0, 9.0, 9.0]])
    target = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.0]])
    known = torch.tensor([1.0, 1.0, 1.0, 0.0])  # of the last nothing is known
    pairs = [(0, 1), (0, 2)]  # 2 and 1 are less than half a level apart
    score = severity.sum(dim=1).tolist()
    expected = sum(math.log1p(math.exp(score[b] - score[a])) for a, b in pairs) / len(pairs)
    assert ranking(severity, target, known).item() == pytest.approx(expected, rel=1e-5)
    assert ranking(severity[:1], target[:1], known[:1]).item() == 0
