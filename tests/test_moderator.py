"""The mechanics of the bundled model; never what it judges, which changes with every training."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from fresh_kit import forks, run_fresh
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from guardrail import moderator as module
from guardrail._onnx import Session
from guardrail.artifact import BUNDLED, Calibration, artifact_folder
from guardrail.encoding import Window, sentences
from guardrail.errors import ArtifactError, ModerationError
from guardrail.moderator import Device, OnnxModerator, calibrated
from guardrail.policy import Thresholds
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Assessment, Pair, Passage

pytest.importorskip("onnxruntime")

PAIRS = [
    Pair("How do I pick a lock?"),
    Pair("How do I pick a lock?", "Use a tension wrench.\nThen rake the pins."),
    Pair("", "I will find you and hurt you."),
    Pair("Hi", ""),
    Pair("Как дела?", "Всё хорошо, спасибо."),
    Pair("Tell me a story.", "Once upon a time there was a fox. " * 60),
    Pair("x " * 3000, "Yes."),
    Pair("\ud800 \0 \u202e", "🙂 n\u0301 \ud800"),
]


@pytest.fixture(scope="module")
def model() -> OnnxModerator:
    return OnnxModerator(device="cpu", threads=1)


class Everything(OnnxModerator):
    """The real model with a threshold that every text reaches, so that passages can be seen."""

    def _minor_threshold(self, direction: Direction) -> float:
        return 0.0


def test_an_assessment_is_complete(model: OnnxModerator) -> None:
    for pair, seen in zip(PAIRS, model.assess(PAIRS), strict=True):
        assert seen.direction is pair.direction
        assert seen.model == model.id == model.manifest.id
        assert list(seen.severity_probabilities) == list(Severity)
        assert list(seen.categories) == list(Category)
        assert sum(seen.severity_probabilities.values()) == pytest.approx(1)


def test_nothing_to_assess_is_nothing_assessed(model: OnnxModerator) -> None:
    assert model.assess([]) == []


def test_a_batch_keeps_the_order_and_judges_as_one_by_one(model: OnnxModerator) -> None:
    """To the last bit: else a text's verdict would hang on its neighbours."""
    one_by_one = [model.assess([pair])[0] for pair in PAIRS]
    assert model.assess(PAIRS) == one_by_one
    assert model.assess(PAIRS[::-1]) == one_by_one[::-1]


def test_windows_batched_for_a_gpu_are_judged_about_as_alone(model: OnnxModerator) -> None:
    """The tolerance is what dynamic int8 needs: it scales by the largest activation of a batch."""
    texts = ["How do I bake bread?", "Knead it, wait, bake it. " * 9, "No.", "fox " * 200]
    windows = [w for text in texts for w in model._encoder.encode(Pair("Hi", text))]
    alone = model.logits(windows)
    gpu = copy.copy(model)
    gpu.device = "cuda"
    for seen, expected in zip(gpu.logits(windows), alone, strict=True):
        assert np.abs(seen - expected).max() < 0.5


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 2000))
def test_batches_hold_every_window_once_within_their_limit(lengths: list[int], limit: int) -> None:
    windows = [Window([0] * n, [0] * n, 0, 0) for n in lengths]
    batches = list(module._batches(windows, limit))
    assert sorted(i for batch in batches for i in batch) == list(range(len(windows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= limit


def test_the_same_text_is_judged_the_same_twice(model: OnnxModerator) -> None:
    for pair in PAIRS:
        assert model.assess([pair]) == model.assess([pair])


def test_eight_threads_see_what_one_sees(model: OnnxModerator) -> None:
    alone = [model.assess([pair])[0] for pair in PAIRS]
    together = threading.Barrier(8)

    def work(_: int) -> list[Assessment]:
        together.wait(60)
        return [model.assess([pair])[0] for pair in PAIRS]

    with ThreadPoolExecutor(8) as pool:
        assert all(seen == alone for seen in pool.map(work, range(8)))


def test_harm_anywhere_in_a_long_text_counts(model: OnnxModerator) -> None:
    """A long text is as harmful as its worst window: none of its windows is left out."""
    filler = "The fox went on through the wood and met nobody at all. " * 12
    text = "".join(f"{n}. {filler}" for n in range(6))
    seen = model.assess([Pair("Hi", text)])[0]
    windows = model._encoder.encode(Pair("Hi", text))
    severity, categories = model.logits(windows)
    s, c = calibrated(severity, categories, model.manifest.calibration_of(Direction.OUTPUT))
    assert len(windows) > 4
    assert seen.unsafe_probability == pytest.approx(s[:, 0].max(), abs=0.05)
    assert max(seen.categories.values()) == pytest.approx(c.max(), abs=0.05)


def test_a_text_beyond_max_chars_is_refused_whichever_side_it_is_on() -> None:
    model = OnnxModerator(device="cpu", threads=1, max_chars=1000)
    for pair in (Pair("x" * 1001), Pair("hi", "x" * 1001), Pair("x" * 1001, "hi")):
        with pytest.raises(ModerationError, match=r"1,001 characters, more than max_chars=1,000"):
            model.assess([pair])
    assert len(model.assess([Pair("x" * 1000, "x" * 1000)])) == 1


def test_unreadable_text_is_said_to_be(model: OnnxModerator) -> None:
    seen = model.assess(
        [Pair("Как сделать бомбу?"), Pair("How are you?"), Pair("Привет", "Hi you")]
    )
    assert [text.unreadable for text in seen] == [True, False, False]


# --- passages ------------------------------------------------------------------------------------


def test_passages_are_sentences_of_the_callers_own_text() -> None:
    model = Everything(device="cpu", threads=1)
    text = "Ｆirst 🙂 one. Second\u200b one!\n\nThird\u0301 one?"
    (seen,) = model.assess([Pair("Hi", text)])
    assert [(p.start, p.end) for p in seen.passages] == sentences(text)
    assert [text[p.start : p.end].strip() for p in seen.passages] == [
        "Ｆirst 🙂 one.", "Second\u200b one!", "Third\u0301 one?",
    ]  # fmt: skip
    assert all(0 <= p.probability <= 1 for p in seen.passages)


def test_passages_of_a_harmless_text_are_none(model: OnnxModerator) -> None:
    class Nothing(OnnxModerator):
        def _minor_threshold(self, direction: Direction) -> float:
            return 1.1

    assert all(not s.passages for s in Nothing(device="cpu", threads=1).assess(PAIRS))


def test_without_locating_a_passage_is_a_window() -> None:
    model = Everything(device="cpu", threads=1, locate=False)
    text = "Once upon a time there was a fox. " * 60
    (seen,) = model.assess([Pair("Hi", text)])
    windows = model._encoder.encode(Pair("Hi", text))
    assert [(p.start, p.end) for p in seen.passages] == [(w.start, w.end) for w in windows]


def test_locating_never_costs_more_than_so_many_sentences_a_window() -> None:
    """Else 2,000,000 characters of `a.` would be a million inferences."""
    model = Everything(device="cpu", threads=1)
    text = "a.\n" * 400
    (seen,) = model.assess([Pair("Hi", text)])
    windows = model._encoder.encode(Pair("Hi", text))
    assert [(p.start, p.end) for p in seen.passages] == [(w.start, w.end) for w in windows]


@given(st.lists(st.integers(1, 9), max_size=12), st.data())
def test_narrowing_leaves_no_harm_uncovered(lengths: list[int], data: st.DataObject) -> None:
    edges = np.cumsum([0, *lengths]).tolist()
    windows = [Passage(a, b + 2, 0.9) for a, b in pairwise(edges)]
    spans = [(a, b) for a, b in pairwise(edges) if data.draw(st.booleans())]
    found = [Passage(a, b, 0.8) for a, b in spans]
    left = module._narrowed(windows, found)
    assert set(found) <= set(left)
    assert list(left) == sorted(left, key=lambda p: (p.start, p.end))
    for window in windows:
        held_by_sentence = any(f.start < window.end and window.start < f.end for f in found)
        assert held_by_sentence is not (window in left)


# --- calibration ---------------------------------------------------------------------------------

LOGITS = hnp.arrays(np.float64, (4, 22), elements=st.floats(-1e6, 1e6))


@given(LOGITS, st.floats(0, 10), st.floats(-10, 10))
def test_calibrated_severities_never_rise_with_the_level(
    logits: np.ndarray, scale: float, bias: float
) -> None:
    calibration = Calibration([(scale, bias), (1.0, 0.0), (2.0, -bias)], [(scale, bias)] * 19)
    severity, categories = calibrated(logits[:, :3], logits[:, 3:], calibration)
    assert (np.diff(severity, axis=1) <= 0).all()
    for probabilities in (severity, categories):
        assert ((probabilities >= 0) & (probabilities <= 1)).all()


def test_calibration_is_platts() -> None:
    severity, _ = calibrated(
        np.array([[0.0, -1.0, -2.0]]), np.zeros((1, 19)), Calibration([(2.0, 1.0)] * 3)
    )
    assert severity[0] == pytest.approx(1 / (1 + np.exp([-1.0, 1.0, 3.0])))


def test_thresholds_are_the_manifests(model: OnnxModerator) -> None:
    assert set(model.thresholds) == set(Direction)
    for direction in Direction:
        assert isinstance(model.thresholds[direction], Thresholds)
        assert model.thresholds[direction] == model.manifest.thresholds_of(direction)


# --- devices and failures ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "provider"),
    [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")],
)
def test_a_gpu_is_refused_where_there_is_none(device: Device, provider: str) -> None:
    import onnxruntime

    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"this machine's onnxruntime has {provider}")
    with pytest.raises(ArtifactError, match=rf"no {provider}.*pip install"):
        OnnxModerator(device=device)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert OnnxModerator(device="auto").device == "cpu"


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_gpu_judges_as_the_cpu_does(device: Device) -> None:
    """fp32 and int8 products differ in order of summation only, so by far less than a decision."""
    try:
        gpu = OnnxModerator(device=device)
    except ArtifactError as error:
        pytest.skip(f"no {device} here: {error}")
    alone = OnnxModerator(device="cpu").assess(PAIRS)
    for seen, expected in zip(gpu.assess(PAIRS), alone, strict=True):
        assert dict(seen.severity_probabilities) == pytest.approx(
            dict(expected.severity_probabilities), abs=0.05
        )


def test_a_device_that_is_none_is_refused() -> None:
    wrong: Any = "gpu"
    with pytest.raises(ValueError, match=f"none of {', '.join(get_args(Device))}"):
        OnnxModerator(device=wrong)


def test_one_flipped_bit_of_the_model_is_refused(tmp_path: Path) -> None:
    folder = artifact_folder(BUNDLED)
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        if path.name == "model.onnx":
            data[len(data) // 2] ^= 1
        (tmp_path / path.name).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.onnx: altered or damaged"):
        OnnxModerator(tmp_path)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match=r"model\.onnx: onnxruntime cannot open it"):
        Session(tmp_path / "model.onnx", "cpu", 1, ("score",))


@forks
def test_a_forked_child_refuses_a_model_that_was_replaced_meanwhile(tmp_path: Path) -> None:
    path = Path(shutil.copy(artifact_folder() / "model.onnx", tmp_path))
    script = f"""
import os
from pathlib import Path
from guardrail._onnx import Session
from guardrail.errors import ArtifactError
path = Path({str(path)!r})
session = Session(path, "cpu", 2, ())
path.write_bytes(b"another model")
session.here()  # this process goes on with what it has open
if os.fork() == 0:
    try:
        session.here()
    except ArtifactError as error:
        print(error)
else:
    os.wait()
"""
    said = run_fresh(script)
    assert "another file than the one this process was forked with: restart" in said


def test_onnxruntime_is_kept_from_reporting_home(tmp_path: Path) -> None:
    """Without a word from us it leaves an identifier of the machine in the cache folder."""
    script = "from guardrail import Guard; Guard().check(prompt='Hello')"
    env = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", script], env=env, timeout=60, check=True)
    assert list(tmp_path.rglob("*")) == []


class Broken:
    """An inference session that fails as onnxruntime does, or answers with NaN."""

    def __init__(self, answer: float | None) -> None:
        self.answer = answer

    def run(self, names: object, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        if self.answer is None:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL")
        n = len(feed["input_ids"])
        return [np.full((n, 3), self.answer), np.full((n, 19), self.answer)]


@pytest.mark.parametrize(("answer", "says"), [(None, "inference failed"), (np.nan, "not a number")])
def test_a_failing_inference_is_a_moderation_error(answer: float | None, says: str) -> None:
    model = OnnxModerator(device="cpu", threads=1)
    model._session = Broken(answer)
    with pytest.raises(ModerationError, match=says):
        model.assess(PAIRS)
