"""The export of a chat policy: the real command on a tiny Llama with a LoRA adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import onnxruntime
import tiny_policy
import torch
import transformers

from guardrail.local import OnnxChat, read_policy_manifest
from training import export_policy
from training.export_policy import PROMPTS, Args, chat_format, main, shape_of
from training.llama_onnx import build
from training.lm import encode_prompt, load_policy, new_adapter
from training.rollout import greedy, texts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With random weights, so that it changes every answer."""
    folder = tmp_path_factory.mktemp("adapter")
    lm = new_adapter(load_policy(str(base)), rank=4)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    lm.model.save_pretrained(folder)
    return folder


def by_torch(policy: Path, tokens: int) -> list[str]:
    """Greedy answers one by one, without what the export has of its own: merging and padding."""
    lm = load_policy(str(policy))
    answers = []
    for prompt in PROMPTS:
        asked = [encode_prompt(lm.tokenizer, prompt)]
        answers += texts(lm.tokenizer, greedy(lm.model, lm.tokenizer, asked, tokens))
    return answers


def test_the_exported_adapter_answers_as_torch_does(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    main(Args(policy=str(adapter), out=tmp_path, precision="fp32", agreement=1.0, tokens=12))
    chat = OnnxChat(tmp_path, max_new_tokens=12)
    expected = by_torch(adapter, 12)
    assert [chat.complete(prompt).text for prompt in PROMPTS] == expected
    assert expected != by_torch(base, 12)


def test_in_int8_it_says_what_it_is_and_how_near_it_came(adapter: Path, tmp_path: Path) -> None:
    main(Args(policy=str(adapter), out=tmp_path, agreement=0.5, tokens=8))
    manifest = read_policy_manifest(tmp_path)
    assert manifest.precision == "int8"
    assert manifest.adapter is not None
    assert manifest.adapter.startswith(f"{adapter.name}@sha256:")
    assert manifest.metrics["graph_agreement"] == 1.0
    assert 0.5 <= manifest.metrics["agreement"] <= 1
    assert manifest.metrics["prompts"] == 20
    weights = (tmp_path / "model.onnx").stat().st_size
    assert weights < (Path(load_policy(str(adapter)).base) / "model.safetensors").stat().st_size


def test_a_model_that_strays_from_torch_is_not_handed_out(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manifest.json").write_text("of an export before", encoding="utf-8")
    with pytest.raises(SystemExit, match="not usable"):
        main(Args(policy=str(adapter), out=tmp_path, agreement=1.1, tokens=4))
    assert not (tmp_path / "manifest.json").exists()

    def askew(weights: Any, *args: Any) -> Any:
        name = "model.layers.0.self_attn.o_proj.weight"
        return build({**weights, name: -weights[name]}, *args)

    monkeypatch.setattr(export_policy, "build", askew)
    with pytest.raises(SystemExit, match="the graph gives"):
        main(Args(policy=str(adapter), out=tmp_path, tokens=4))


@pytest.mark.parametrize(
    "options",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
    ids=["grouped-untied", "odd-head", "llama3-rope"],
)
def test_the_graph_is_the_model_with_and_without_a_cache(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
        "initializer_range": 0.3, "max_position_embeddings": 128,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **options})).eval()
    shape = shape_of(model, "tiny")
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    graph = build(weights, shape, "fp32").SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, 40, (3, 50))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    cache = {
        f"past_{what}_{i}": np.zeros((3, shape.kv_heads, 0, shape.head), np.float32)
        for i in range(shape.layers)
        for what in ("key", "value")
    }
    for start, end, keep in ((0, 30, 30), (30, 31, 1), (31, 50, 4)):
        feed = {"input_ids": ids[:, start:end], "keep": np.array([keep])}
        logits, *grown = session.run(None, feed | cache)
        cache = dict(zip(cache, grown, strict=True))
        np.testing.assert_allclose(logits, expected[:, end - keep : end], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages | length }} {{ messages[-1]['content'] }}", "chat template does"),
        ("{% for m in messages %}[{{ m['content'] | upper }}]{% endfor %}", "turn by turn"),
        (
            "{% for m in messages %}{{ m['role'] }} {{ m['content'] | replace('1', ' 2 ') }} "
            "{% endfor %}",
            "does more to messages",
        ),
    ],
)
def test_a_template_that_does_more_than_enclose_turns_is_refused(
    base: Path, template: str, says: str
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    with pytest.raises(SystemExit, match=says):
        chat_format(tokenizer, base / "tokenizer.json")


def test_what_cannot_be_exported_is_named() -> None:
    with pytest.raises(SystemExit, match="train an adapter first"):
        main(Args(policy="training/adapters/none"))
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8)
    with pytest.raises(SystemExit, match="a gpt2 model"):
        shape_of(transformers.GPT2LMHeadModel(config), "some/base")


def test_the_manifest_holds_the_template_as_strings(base: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    found = chat_format(tokenizer, base / "tokenizer.json")
    assert found.before["user"] == "<|im_start|> user "
    assert set(found.before) == {"user", "assistant", "system"}
    assert found.answer == "<|im_start|> assistant "
    assert json.dumps(found.after)
