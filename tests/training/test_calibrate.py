"""How a calibration is chosen, thresholds, metrics, the report and the card."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tyro")

from guardrail.calibration import fit_platt, risk_controlling_threshold
from training import calibrate
from training.calibrate import markdown as calibration_markdown
from training.evaluation_report import filled, markdown
from training.metrics import (
    binary_metrics,
    bootstrap,
    calibration_metrics,
    category_metrics,
    recall_at_fpr,
    severity_metrics,
)
from training.scaling import choose, held_out_losses
from training.thresholds import category_thresholds, fit_categories, fit_levels, risk_control

ROOT = Path(__file__).parents[2]


def texts(n: int, scale: float, bias: float, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, n)
    truth = (rng.random(n) < 1 / (1 + np.exp(-(scale * logits + bias)))).astype(float)
    return logits, truth, [f"prompt {i // 2}" for i in range(n)]


# --- choosing ------------------------------------------------------------------------------------


def test_a_head_that_is_off_is_scaled_when_there_are_texts_enough_to_tell() -> None:
    choice = choose(*texts(2000, 0.4, -0.8, 0), (1.0, 0.0))
    assert choice.name in ("platt", "shrunk")
    assert choice.scale == pytest.approx((0.4, -0.8), abs=0.15)
    assert choice.losses[choice.name] < choice.losses["none"]


def test_a_head_that_is_right_is_left_alone() -> None:
    assert choose(*texts(700, 1.0, 0.0, 1), (1.0, 0.0)).name == "none"
    assert choose(*texts(2000, 1.0, 0.0, 1), (1.0, 0.0)).scale == pytest.approx((1, 0), abs=0.15)


def test_pure_temperature_is_not_given_a_bias() -> None:
    assert choose(*texts(700, 0.35, 0.0, 2), (1.0, 0.0)).name == "temperature"
    assert choose(*texts(2000, 0.35, 0.0, 2), (1.0, 0.0)).scale[1] == pytest.approx(0, abs=0.1)


def test_a_small_shift_of_many_texts_is_mended() -> None:
    """A quarter of a logit hides within a standard error of the log-loss of 1,020 texts."""
    biases = [choose(*texts(1020, 1.0, -0.25, seed), (1.0, 0.0)).scale[1] for seed in range(8)]
    assert np.mean(biases) == pytest.approx(-0.25, abs=0.07)


def test_few_texts_do_not_move_a_head_far() -> None:
    """On 40 texts a free fit would chase noise; over many draws the choice must cost less."""
    fresh, truth, _ = texts(4000, 1.0, 0.0, 99)

    def cost(scale: tuple[float, float]) -> float:
        z = scale[0] * fresh + scale[1]
        return float(np.mean(np.logaddexp(0, z) - truth * z))

    draws = [texts(40, 1.0, 0.0, seed) for seed in range(12)]
    chosen = np.mean([cost(choose(*draw, (1.0, 0.0)).scale) for draw in draws])
    free = np.mean([cost(fit_platt(draw[0], draw[1])) for draw in draws])
    assert chosen < free


def test_folds_keep_a_prompt_together() -> None:
    """Two texts per prompt, whose label is in the logit's whole number: a fold that had seen one of
    them would know the other."""
    logits = np.repeat(np.arange(40.0), 2)
    truth = np.repeat(np.random.default_rng(0).integers(0, 2, 40), 2).astype(float)
    seen: list[set[float]] = []

    def fit(x: np.ndarray, y: np.ndarray) -> Any:
        seen.append(set(x))
        return lambda z: np.where([v in seen[-1] for v in z], 1.0, 0.5)

    losses = held_out_losses(logits, truth, [f"{x}" for x in logits], fit)
    assert losses == pytest.approx(np.full(80, np.log(2)))


# --- thresholds ----------------------------------------------------------------------------------


def test_the_minor_threshold_flags_no_more_benign_texts_than_allowed() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 600)
    p = 1 / (1 + np.exp(-(rng.normal(truth * 1.5 - 1.5, 1)[:, None] - np.array([0, 1.5, 3]))))
    benign = rng.beta(1, 3, 400)
    levels = fit_levels(p, truth, benign, 0.02)
    assert (benign >= levels["minor"]).mean() <= 0.02
    free = fit_levels(p, truth, np.array([]), 0.02)
    assert free["minor"] <= levels["minor"]


def test_the_minor_threshold_is_in_the_middle_of_those_that_are_as_good() -> None:
    truth = np.repeat([0, 3], 50)
    apart = np.where(truth > 0, 0.8, 0.2)[:, None].repeat(3, axis=1)
    assert fit_levels(apart, truth, np.array([]), 0.02)["minor"] == pytest.approx(0.5, abs=0.02)
    one_off = apart.copy()
    one_off[0] = 0.6  # a harmless text that a threshold of 0.6 and less flags: F1 0.990
    assert fit_levels(one_off, truth, np.array([]), 0.02)["minor"] > 0.6
    level = fit_levels(one_off, truth, np.array([]), 0.02, slack=0.02)["minor"]
    assert level == pytest.approx(0.5, abs=0.02)


def test_people_who_call_more_harmful_lower_the_minor_threshold_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 600)
    p = 1 / (1 + np.exp(-(rng.normal(truth * 1.5 - 1.5, 1)[:, None] - np.array([0, 1.5, 3]))))
    benign = rng.beta(1, 12, 400)
    alone = fit_levels(p, truth, benign, 0.02)["minor"]
    people = p[:, 0], p[:, 0] > 0.2
    heeded = fit_levels(p, truth, benign, 0.02, others=[people])["minor"]
    assert 0.2 < heeded < alone
    assert (benign >= heeded).mean() <= 0.02
    strict = fit_levels(p, truth, benign, 0.0, others=[people])["minor"]
    assert strict > benign.max()


def test_category_thresholds_keep_the_rate_and_skip_rare_categories() -> None:
    rng = np.random.default_rng(0)
    names = (rng.random((500, 3)) < np.array([0.3, 0.3, 0.002])).astype(float)
    p = rng.beta(1 + 4 * names, 3)
    found = category_thresholds(p, names, np.ones(500, bool), 0.05, few=10)
    assert found[2] is None
    for c in (0, 1):
        threshold = found[c]
        assert threshold is not None
        assert (p[names[:, c] == 0, c] >= threshold.value).mean() <= 0.05


def test_one_threshold_for_all_categories_unless_their_own_are_worth_it() -> None:
    rng = np.random.default_rng(1)
    names = (rng.random((800, 2)) < 0.3).astype(float)
    groups = [str(i) for i in range(800)]
    alike = np.clip(0.25 + 0.5 * names + rng.normal(0, 0.1, names.shape), 0, 1)
    own, _ = fit_categories(alike, names, np.ones(800, bool), groups, few=10)
    assert own[0] == own[1]
    apart = alike * np.array([1.0, 0.3])  # the same order, on another scale
    own, scores = fit_categories(apart, names, np.ones(800, bool), groups, few=10)
    assert own[0] > own[1]
    assert max(scores.values()) > scores["one for all"]


def test_promises_are_priced_or_told_what_they_need() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2, 3], [300, 100, 100, 10])
    p = rng.beta(1 + 2 * truth, 3)[:, None] * np.ones(3)
    rows = risk_control(p, truth, rng.beta(1, 4, 200), 0.1)
    by_harm = {(row["harm"], row["alpha"]): row for row in rows}
    assert by_harm["severe", 0.05]["needed"] == 45
    priced = by_harm["moderate", 0.05]
    expected = risk_controlling_threshold(p[truth >= 2, 0], 0.05, 0.1)
    assert priced["threshold"] == expected.value
    assert priced["passed"] <= priced["bound"] <= 0.05
    assert by_harm["moderate", 0.1]["harmless_flagged"] <= priced["harmless_flagged"]


# --- metrics -------------------------------------------------------------------------------------


def test_binary_figures_by_hand() -> None:
    unsafe = np.array([1, 1, 0, 0], bool)
    score = np.array([0.9, 0.4, 0.6, 0.1])
    figures = binary_metrics(unsafe, score >= 0.5, score)
    assert figures["f1"] == figures["recall"] == figures["fpr"] == 0.5
    assert figures["auroc"] == 0.75
    assert figures["recall_at_1_fpr"] == 0.5


def test_a_set_of_one_class_has_only_the_figures_that_make_sense() -> None:
    scores = np.array([0.1, 0.9])
    assert set(binary_metrics(np.zeros(2, bool), scores > 0.5, scores)) == {"n", "unsafe", "fpr"}


def test_recall_at_a_rate_is_that_of_the_best_threshold() -> None:
    unsafe = np.repeat([True, False], 100)
    score = np.concatenate([np.linspace(0.5, 1, 100), np.linspace(0, 0.6, 100)])
    by_hand = max(
        (score[:100] >= t).mean() for t in [*score, 2.0] if (score[100:] >= t).mean() <= 0.05
    )
    assert recall_at_fpr(unsafe, score, 0.05) == pytest.approx(by_hand)


def test_severity_figures_by_hand() -> None:
    figures = severity_metrics(np.array([0, 1, 2, 3, 3]), np.array([0, 1, 2, 1, 0]))
    assert figures["severity_exact"] == pytest.approx(0.6)
    assert figures["off_by_two"] == pytest.approx(0.4)
    assert figures["severe_caught"] == 0.5
    assert figures["severe_caught_low"] == pytest.approx(1 - 0.975**0.5, abs=1e-6)  # 1 of 2
    assert figures["grave_recall"] == pytest.approx(2 / 3)


def test_calibration_is_told_level_by_level_without_and_with_it() -> None:
    truth, before = np.array([0, 1, 3, 3]), np.full((4, 3), 0.5)
    after = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]])
    table = calibration_metrics(truth, before, after, ["minor", "moderate", "severe"])
    assert [row["reached"] for row in table.values()] == [3, 2, 2]
    assert table["minor"]["ece_before"] == 0.25
    assert table["severe"]["log_loss_before"] == pytest.approx(math.log(2))
    for row in table.values():
        assert row["ece_after"] == 0
        assert row["log_loss_after"] < 1e-5


def test_categories_that_no_text_has_are_left_out() -> None:
    truth = np.array([[True, False], [False, False]])
    table = category_metrics(truth, truth, truth.astype(float), np.array([True, False]), ["a", "b"])
    assert list(table) == ["a"]
    assert table["a"] == {"n": 1} | dict.fromkeys(
        ("f1", "auroc", "auprc", "recall", "recall_at_1_fpr", "recall_at_5_fpr"), 1.0
    )


def test_texts_of_one_prompt_are_drawn_together() -> None:
    """Fifty answers to each of eight prompts, all alike: there are eight opinions, not 400."""
    values = np.repeat(np.random.default_rng(0).normal(size=8), 50)
    low, high = bootstrap(lambda i: float(values[i].mean()), np.repeat(np.arange(8), 50))
    alone_low, alone_high = bootstrap(lambda i: float(values[i].mean()), np.arange(400))
    assert high - low > 3 * (alone_high - alone_low)
    assert low < values.mean() < high


# --- words ---------------------------------------------------------------------------------------

FIGURES: dict[str, Any] = {
    "model": "tiny-1", "split": "test", "limit": None,
    "sets": {
        "annotated answers": {
            "kind": "annotated", "labels": "ai", "n": 10, "unsafe": 4, "f1": 0.5, "f1_low": 0.4,
            "f1_high": 0.6, "kappa": 0.7, "calibration": {"minor": {"ece_before": 0.125}},
            "categories": {"Drugs": {"n": 3, "f1": 0.25}},
        },
        "benign answers": {"kind": "harmless", "labels": "derived", "n": 5, "fpr": 0.2},
    },
    "artifact": {
        "megabytes": 24.1,
        "parity": {"precision": "int8", "equal": 0.9975, "texts": 2000, "largest_step": 1},
        "speed": {
            "machine": "a machine", "load": 0.5, "onnxruntime": "1", "cuda": {"skipped": "none"},
            "cpu": {"ms_by_tokens": {"32": 4.5, "128": 9.0}, "texts_per_second": 101.0},
        },
    },
    "robustness": [{"disguise": "casing", "n": 4, "kept": 0.75}],
    "prefixes": {"harmful": [{"share": 0.5, "flagged": 0.4, "caught": 0.45}]},
    "groups": [{"axis": "age", "groups": 3, "plain_n": 120, "plain": 0.05, "plain_worst": 0.075,
                "plain_of": "teenagers"}],
}  # fmt: skip


def test_the_report_has_every_figure_with_its_interval() -> None:
    text = markdown(FIGURES)
    assert "| annotated answers | ai | 10 | 4 | 0.500 (0.40-0.60) |" in text
    assert "| benign answers | derived | 5 | 0.200 |" in text
    assert "| casing | 4 | 0.750 |" in text
    assert "| harmful | 0.450 |" in text
    assert "| Drugs | 3 | 0.250 |" in text
    assert "| age | 3 | 120 | 0.050 | 0.075 | teenagers |" in text
    assert "| annotated answers, at least minor | 0.125 |" in text
    assert "- 24.1 MB" in text
    assert "- int8 decides as fp32 does on 99.75% of 2000 texts" in text
    assert "- cpu: 4.5 ms for 32 tokens, 9.0 ms for 128 tokens; 101.0 texts a second" in text
    assert "cuda" not in text


def test_a_card_is_filled_in_between_its_marks_and_nowhere_else() -> None:
    card = "# Mine\n<!-- figures: harmless -->\nold\n<!-- end -->\nkept\n"
    once = filled(card, FIGURES)
    assert "old" not in once
    assert "| benign answers | derived | 5 | 0.200 |" in once
    assert once.startswith("# Mine\n")
    assert once.endswith("<!-- end -->\nkept\n")
    assert filled(once, FIGURES) == once


@pytest.mark.parametrize("card", ["no marks", "<!-- figures: nonsense -->\n<!-- end -->"])
def test_a_card_that_cannot_be_filled_in_is_an_error(card: str) -> None:
    with pytest.raises(SystemExit, match="the model card has"):
        filled(card, FIGURES)


def test_the_models_own_card_has_marks_that_are_known() -> None:
    text = (ROOT / "docs" / "model-card.md").read_text(encoding="utf-8")
    assert len(re.findall("<!-- figures: ", text)) >= 6
    filled(text, FIGURES)


def test_the_calibration_report_is_markdown_and_its_figures_are_json() -> None:
    report = {
        "model": "tiny-1",
        "output": {
            "annotated": 3, "benign": 2, "others": 4,
            "heads": {
                "minor": {
                    "chosen": "none", "losses": {"none": 0.3, "isotonic": 0.2}, "ece_before": 0.1,
                    "ece_after": 0.1, "ece_by_chance": 0.05,
                }
            },
            "for_target_fpr": {}, "category_ways": {"one for all": 0.5},
            "risk_control": [{"harm": "severe", "alpha": 0.1, "n": 3, "needed": 22}],
        },
    }  # fmt: skip
    text = calibration_markdown(json.loads(json.dumps(report)), 0.1)
    assert "3 annotated, 2 benign, 4 others for the threshold" in text
    assert "better for ['minor']" in text
    assert "| severe | 0.1 | 3 | needs 22 |" in text


@pytest.mark.parametrize("rate", [-1.0, 1.5, float("nan")])
def test_a_target_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(SystemExit, match=r"--target-fpr is .*: it has to be from 0 to 1"):
        calibrate.main(calibrate.Args(target_fpr=rate))
