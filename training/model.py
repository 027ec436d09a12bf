"""The moderation model: an encoder, mean pooling, an ordinal and a multi-label head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from guardrail.encoding import Encoder, EncoderConfig
from training.losses import monotone_logits
from training.runs import load_whole


class ModerationModel(nn.Module):
    """Encoder, mean pooling, two linear heads."""

    def __init__(self, encoder: nn.Module, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.severity = nn.Linear(width, 3)
        self.categories = nn.Linear(width, 19)
        nn.init.constant_(self.categories.bias, -3.0)  # each of the 19 is rare

    @classmethod
    def from_base(cls, folder: Path, layers: int | None = None) -> ModerationModel:
        """layers: keep the first so many of the base's; all of them by default."""
        config = AutoConfig.from_pretrained(folder)
        if layers is not None:
            if layers > config.num_hidden_layers:  # else those it lacks would be random
                raise SystemExit(f"{folder}: it has {config.num_hidden_layers} layers, no {layers}")
            config.num_hidden_layers = layers
        if is_causal(config):
            config.use_cache = False  # nothing is generated
        encoder = AutoModel.from_pretrained(folder, config=config, **_options(config))
        return cls(encoder, config.hidden_size)

    @classmethod
    def load(cls, folder: Path) -> ModerationModel:
        """What `main` wrote: `config.json` of the encoder and `model.pt`."""
        config = AutoConfig.from_pretrained(folder)
        model = cls(AutoModel.from_config(config, **_options(config)), config.hidden_size)
        model.load_state_dict(load_whole(folder / "model.pt"))
        return model.eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(batch, length) each -> severity logits (batch, 3), category logits (batch, 19)."""
        pooled = self.dropout(mean_pooled(self.encoder, input_ids, attention_mask, token_type_ids))
        return monotone_logits(self.severity(pooled)), self.categories(pooled)


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a token of the model sees only what comes before it."""
    return config.model_type == "llama"


def _options(config: PretrainedConfig) -> dict[str, bool]:
    return {} if is_causal(config) else {"add_pooling_layer": False}


def mean_pooled(
    encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
) -> Tensor:
    """Mean of the encoder's last hidden states over real tokens: (batch, width)."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if getattr(encoder.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = token_type_ids
    hidden = encoder(**inputs).last_hidden_state
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


def summary_of(folder: Path) -> dict[str, Any]:
    """What a run wrote last; SystemExit where none has finished in `folder`."""
    path = folder / "summary.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise SystemExit(f"{folder}: no finished run of training.moderation") from None
    except ValueError as error:
        raise SystemExit(f"{path}: not JSON: {error}: damaged, or half written") from None
    return found


def encoder_of(folder: Path) -> Encoder:
    """The encoder that a trained model's texts went through, by what its run wrote."""
    trained = summary_of(folder)["args"]
    config = EncoderConfig(trained["max_tokens"], trained["prompt_tokens"], trained["overlap"])
    return Encoder.from_file(folder / "tokenizer.json", config)
