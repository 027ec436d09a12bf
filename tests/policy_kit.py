"""Tiny chat policies, real and on disk: a Llama that recites a text, and one with random weights.

Its tokens are bytes, so that a character beyond ASCII is several of them.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from guardrail.local import ChatFormat, PolicyManifest
from training.llama_onnx import LlamaShape, Precision, Weights, build

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
START, END = 1, 2
ROLES = ("system", "user", "assistant")
CHAT = ChatFormat(
    opening="<|im_start|>system\nBe kind.<|im_end|>\n",
    before={role: f"<|im_start|>{role}\n" for role in ROLES},
    after=dict.fromkeys(ROLES, "<|im_end|>\n"),
    answer="<|im_start|>assistant\n",
)


def tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


def _write(
    folder: Path, weights: Weights, shape: LlamaShape, context: int, precision: Precision
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(build(weights, shape, precision), str(folder / "model.onnx"))
    tokenizer().save(str(folder / "tokenizer.json"))
    PolicyManifest(
        id="tiny",
        base="none",
        adapter=None,
        licence="Apache-2.0",
        command="written by hand",
        created="2026-01-01",
        precision=precision,
        chat=asdict(CHAT),
        stop=[0, END],
        context=context,
        cache={"layers": shape.layers, "kv_heads": shape.kv_heads, "head": shape.head},
    ).write(folder)
    return folder


def _weights(
    vocabulary: int, width: int, shape: LlamaShape, draw: np.random.Generator, size: float
) -> dict[str, np.ndarray]:
    def matrix(rows: int, columns: int) -> np.ndarray:
        return draw.normal(0, size, (rows, columns)).astype(np.float32)

    ones = np.ones(width, np.float32)
    found = {"model.embed_tokens.weight": matrix(vocabulary, width), "model.norm.weight": ones}
    for i in range(shape.layers):
        sizes = {
            "self_attn.q_proj": (shape.heads * shape.head, width),
            "self_attn.k_proj": (shape.kv_heads * shape.head, width),
            "self_attn.v_proj": (shape.kv_heads * shape.head, width),
            "self_attn.o_proj": (width, shape.heads * shape.head),
            "mlp.gate_proj": (2 * width, width),
            "mlp.up_proj": (2 * width, width),
            "mlp.down_proj": (width, 2 * width),
        }
        layer = f"model.layers.{i}"
        found |= {f"{layer}.{name}.weight": matrix(*each) for name, each in sizes.items()}
        found[f"{layer}.input_layernorm.weight"] = ones
        found[f"{layer}.post_attention_layernorm.weight"] = ones
    return found


def _shape(layers: int, heads: int, kv_heads: int, head: int, tied: bool) -> LlamaShape:
    inv_freq = (1e4 ** -(np.arange(0, head, 2) / head)).astype(np.float32)
    return LlamaShape(layers, heads, kv_heads, head, 1e-6, inv_freq, 1.0, tied)


def random_policy(folder: Path, *, context: int = 2048, precision: Precision = "int8") -> Path:
    """Two random layers: what it says is noise, and hangs on all it has read."""
    shape = _shape(2, 4, 2, 8, tied=True)
    draw = np.random.default_rng(0)
    weights = _weights(len(SPECIAL) + 256, 32, shape, draw, 0.3)
    return _write(folder, weights, shape, context, precision)


def reciting_policy(folder: Path, text: str, *, context: int = 2048) -> Path:
    """Answers `text`, whatever it is asked; no byte of it may occur twice, and none be a newline.

    Its layers add nothing, its embedding is one-hot, its head leads from each byte to the next.
    """
    ids = tokenizer().encode(text).ids
    chain = [tokenizer().token_to_id("Ċ"), *ids, END]  # the chat format ends in a newline
    assert len(set(chain)) == len(chain), "a byte occurs twice"
    size = len(SPECIAL) + 256
    shape = _shape(1, 2, 1, 4, tied=False)
    weights = _weights(size, size, shape, np.random.default_rng(0), 0.0)
    weights["model.embed_tokens.weight"] = np.eye(size, dtype=np.float32)
    head = np.zeros((size, size), np.float32)
    for now, then in itertools.pairwise(chain):
        head[then, now] = 5.0
    weights["lm_head.weight"] = head
    return _write(folder, weights, shape, context, "int8")
