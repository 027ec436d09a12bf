"""What a score model stands on: an encoder with mean pooling, or a language model's last token."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel

from guardrail.encoding import EncoderConfig, Window, pad
from guardrail.score import Layout, layout_of
from training.bases import base_folder
from training.ending import in_a_line
from training.lm import load_policy
from training.model import ModerationModel, mean_pooled, summary_of

_MOST_WEIGHTS = 1.9e9  # int8, in one file of at most 2 GB


class Score(nn.Module):
    """A body and one linear output; `normalise` folds a scale and an offset into it."""

    def __init__(self, body: nn.Module, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=1 / (width + 1) ** 0.5)
        nn.init.zeros_(self.head.bias)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """(batch, length) each -> scores (batch,)."""
        pooled = self.dropout(self.pooled(input_ids, attention_mask, token_type_ids))
        return self.head(pooled.to(self.head.weight.dtype)).squeeze(-1)

    def parameter_groups(self, rate: float, head_rate: float) -> list[dict[str, Any]]:
        """The body learns slower than the head."""
        body = [p for p in self.body.parameters() if p.requires_grad]
        return [
            {"params": body, "lr": rate},
            {"params": list(self.head.parameters()), "lr": head_rate},
        ]

    @torch.no_grad()
    def normalise(self, scores: np.ndarray, *, centre: bool) -> None:
        """Make the standard deviation of `scores` 1 and, if asked, their mean 0. A cost keeps its
        zero, which parts safe from unsafe."""
        scale = float(scores.std())
        if not np.isfinite(scale):
            raise SystemExit("answers score nan or infinity: train anew at a lower learning rate")
        if scale < 1e-4:
            raise SystemExit("all answers score the same: nothing was learnt")
        if centre:
            self.head.bias -= float(scores.mean())
        self.head.weight /= scale
        self.head.bias /= scale


class EncoderScore(Score):
    """Mean pooling over an encoder."""

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return mean_pooled(self.body, input_ids, attention_mask, token_type_ids)


class LmScore(Score):
    """The last token of a causal model, its answer's end of turn."""

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        hidden = self.body(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        return hidden.gather(1, last.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])).squeeze(1)


@torch.inference_mode()
def score(
    model: Any, windows: Sequence[Window], pad_id: int, tokens: int = 8192, *, bf16: bool = False
) -> np.ndarray:
    """(len(windows),) scores by torch, in fp32 unless `bf16` is asked for."""
    model.eval()
    device = next(model.parameters()).device
    found = np.empty(len(windows))
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    while order:
        size = max(1, tokens // len(windows[order[0]].ids))
        part, order = order[:size], order[size:]
        batch = pad([windows[i] for i in part], pad_id)
        inputs = {k: torch.from_numpy(v).to(device) for k, v in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found[part] = model(**inputs).float().cpu().numpy()
    return found


@dataclass
class Backbone:
    """A model with its layout, as the manifest will name it."""

    model: Score
    layout: Layout
    encoding: dict[str, Any]
    tokenizer: Path
    base: str


class BackboneArgs(Protocol):
    """The arguments of `score_model` that decide the backbone."""

    out: Path
    bases: Path
    backbone: str
    base: str | None
    init: Path | None
    max_tokens: int
    prompt_tokens: int
    overlap: int
    rank: int


def open_backbone(args: BackboneArgs) -> Backbone:
    """The backbone asked for; its tokenizer is copied into `args.out`."""
    return _encoder(args) if args.backbone == "encoder" else _lm(args)


def _encoder(args: BackboneArgs) -> Backbone:
    assert args.base is not None
    base = args.base
    if args.init is not None:
        if not (args.init / "model.pt").exists():
            raise SystemExit(f"{args.init}: no model.pt: --init is what training.moderation wrote")
        encoder: Any = ModerationModel.load(args.init).encoder
        tokenizer = args.init / "tokenizer.json"
        base = summary_of(args.init)["args"]["base"]
    else:
        folder = base_folder(args.base, args.bases)
        try:
            encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        except (OSError, TypeError, ValueError, SafetensorError) as error:
            raise SystemExit(f"{folder}: not an encoder: {in_a_line(error)}") from error
        tokenizer = folder / "tokenizer.json"
    try:
        config = EncoderConfig(args.max_tokens, args.prompt_tokens, args.overlap)
    except ValueError as error:
        raise SystemExit(f"--max-tokens, --prompt-tokens, --overlap: {error}") from None
    encoding = {"layout": "pair", **config.to_json()}
    model = EncoderScore(encoder, encoder.config.hidden_size)
    return _backbone(args, model, tokenizer, encoding, base)


def _lm(args: BackboneArgs) -> Backbone:
    from peft import LoraConfig, get_peft_model

    assert args.base is not None
    if args.init is not None:
        raise SystemExit("--init is an encoder: it goes with --backbone encoder")
    lm = load_policy(args.base, args.bases)
    size = sum(p.numel() for p in lm.model.parameters())
    if size > _MOST_WEIGHTS:
        raise SystemExit(
            f"{args.base} has {size / 1e9:.1f} billion weights, and an ONNX file holds 2 GB: take "
            f"a --base of {_MOST_WEIGHTS / 1e9:g} billion at most"
        )
    body = get_peft_model(
        lm.model.model,
        LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"),
    )
    # The template is told by what it puts around two marks, so that serving needs no Jinja.
    rendered = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "\x01"}, {"role": "assistant", "content": "\x02"}],
        tokenize=False,
    )
    before, _, rest = rendered.partition("\x01")
    between, _, after = rest.partition("\x02")
    encoding = {
        "layout": "chat",
        "before": before,
        "between": between,
        "after": after.rstrip("\n"),
        "max_tokens": args.max_tokens,
        "pad_id": lm.tokenizer.pad_token_id,
    }
    folder = base_folder(args.base, args.bases)
    model = LmScore(body, lm.model.config.hidden_size, dropout=0.0)
    return _backbone(args, model, folder / "tokenizer.json", encoding, lm.base)


def _backbone(
    args: BackboneArgs, model: Score, tokenizer: Path, encoding: dict[str, Any], base: str
) -> Backbone:
    own = args.out / "tokenizer.json"
    shutil.copy(tokenizer, own)
    return Backbone(model, layout_of(own, encoding), encoding, own, base)
