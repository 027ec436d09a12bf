"""A causal language model as a moderation teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_policy import llama

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from guardrail.encoding import Encoder  # noqa: E402
from guardrail.verdict import Pair  # noqa: E402
from training import label, moderation  # noqa: E402
from training.batching import encode, predict  # noqa: E402
from training.causal import moderation_base  # noqa: E402
from training.data import Example, read_examples  # noqa: E402
from training.model import ModerationModel, encoder_of  # noqa: E402


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("chat"))


def test_a_pair_is_read_between_the_marks_of_a_turn(chat_model: Path, tmp_path: Path) -> None:
    folder = moderation_base(str(chat_model), tmp_path)
    (window,) = Encoder.from_file(folder / "tokenizer.json").encode(Pair("how", "cake"))
    known = json.loads((chat_model / "tokenizer.json").read_text())["model"]["vocab"]
    start, end = known["<|im_start|>"], known["<|im_end|>"]
    assert window.ids == [start, known["how"], end, end, known["cake"], end]
    assert moderation_base(str(chat_model), tmp_path) == folder  # made once


def test_an_encoder_is_its_own_base(tiny_base: Path, tmp_path: Path) -> None:
    assert moderation_base(str(tiny_base), tmp_path) == tiny_base
    assert not list(tmp_path.iterdir())


def test_a_model_without_the_marks_of_a_turn_is_refused(chat_model: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (plain / file).write_bytes((chat_model / file).read_bytes())
    tokenizer = (plain / "tokenizer.json").read_text()
    (plain / "tokenizer.json").write_text(tokenizer.replace("<|im_end|>", "<end>"))
    with pytest.raises(SystemExit, match=r"no <\|im_end\|>: a causal base has to be a chat model"):
        moderation_base(str(plain), tmp_path / "cache")


def test_a_folder_that_holds_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not a model: "):
        moderation_base(str(tmp_path), tmp_path / "cache")


def test_its_first_layers_learn_and_teach(
    chat_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    args = moderation.Args(
        base=str(chat_model), layers=1, data=tiny_data, out=tmp_path / "teacher", epochs=1,
        learning_rate=3e-3, head_learning_rate=1e-2, tokens_per_batch=300, max_tokens=48,
        prompt_tokens=12, overlap=8, bf16=False, limit=60,
    )  # fmt: skip
    moderation.main(args)
    teacher = ModerationModel.load(args.out)
    assert len(teacher.encoder.layers) == 1
    taught = tmp_path / "taught"
    label.main(label.Args(teacher=args.out, data=tiny_data, out=taught, trusted=("benign/",)))
    soft = [e for e in read_examples(taught, "train") if e.source.startswith("annotated/")]
    encoder = encoder_of(args.out)
    severity, _ = predict(teacher, encode(_bare(soft), encoder, 0.0), encoder.pad_id, bf16=False)
    said = [example.soft["severity"][0] for example in soft if example.soft]
    expected = torch.tensor(severity[:, 0]).sigmoid().numpy()
    assert said == pytest.approx(expected, abs=0.02)


def test_a_text_scores_the_same_beside_a_longer_one(chat_model: Path, tmp_path: Path) -> None:
    folder = moderation_base(str(chat_model), tmp_path)
    model = ModerationModel.from_base(folder, layers=1).eval()
    encoder = Encoder.from_file(folder / "tokenizer.json")
    answers = ("cake", "cake is how to make number")
    texts = [Example(prompt="what", response=answer, source="s") for answer in answers]
    rows = encode(texts, encoder, 0.0)
    together, _ = predict(model, rows, encoder.pad_id, bf16=False)
    alone, _ = predict(model, rows[:1], encoder.pad_id, bf16=False)
    assert together[0] == pytest.approx(alone[0], abs=1e-5)


def _bare(examples: list[Example]) -> list[Example]:
    return [Example(prompt=e.prompt, response=e.response, source=e.source) for e in examples]
