"""From examples to batches: tokenised once, a window per text, texts of like length together."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from guardrail.encoding import Encoder, Window, pad
from guardrail.verdict import Pair
from training.data import Example, normalise, targets
from training.losses import APART


class Batching(Protocol):
    """The arguments of a recipe that decide its batches."""

    tokens_per_batch: int
    random_window: float
    prefix: float
    in_prompt: float


@dataclass
class Encoded:
    """An example, its windows and its targets."""

    example: Example
    windows: list[Window]
    severity: np.ndarray
    severity_mask: np.ndarray
    categories: np.ndarray
    category_mask: np.ndarray


def encode(examples: Sequence[Example], encoder: Encoder, teacher_share: float) -> list[Encoded]:
    """Tokenise once, and blend in a teacher's opinion where there is one."""
    encoded = []
    for example in examples:
        windows = encoder.encode(Pair(example.prompt, example.response))
        severity, severity_mask, categories, category_mask = targets(example)
        if example.soft is not None:
            for hard, mask, soft in (
                (severity, severity_mask, example.soft["severity"]),
                (categories, category_mask, example.soft["categories"]),
            ):
                share = np.where(mask > 0, teacher_share, 1.0)
                hard[:] = share * np.asarray(soft, np.float32) + (1 - share) * hard
                mask[:] = 1
        encoded.append(
            Encoded(example, windows, severity, severity_mask, categories, category_mask)
        )
    return encoded


def batches(
    rows: Sequence[Encoded], how: Batching, rng: random.Random
) -> Iterator[tuple[list[Encoded], list[Window]]]:
    """One epoch: a window per text, texts of like length together, batches in random order. With
    `in_prompt`, answers to one prompt that differ in severity are in one batch, as far as it
    holds them."""
    chosen = [(row, _pick_window(row, how, rng)) for row in rows]
    units = _by_prompt(chosen, how.tokens_per_batch) if how.in_prompt else [[c] for c in chosen]
    units.sort(key=lambda unit: (_longest(unit) // 8, rng.random()))
    groups: list[list[tuple[Encoded, Window]]] = [[]]
    for unit in units:
        if groups[-1] and _longest(unit) * (len(groups[-1]) + len(unit)) > how.tokens_per_batch:
            groups.append([])
        groups[-1] += unit
    rng.shuffle(groups)
    for group in groups:
        yield [row for row, _ in group], [window for _, window in group]


def _longest(unit: Sequence[tuple[Encoded, Window]]) -> int:
    return max(len(window.ids) for _, window in unit)


def _by_prompt(
    chosen: Sequence[tuple[Encoded, Window]], tokens: int
) -> list[list[tuple[Encoded, Window]]]:
    """Answers to one prompt whose severities differ together, in parts of at most `tokens` padded
    ones that are each spread over its scale; other texts alone."""
    answers: dict[str, list[int]] = defaultdict(list)
    for index, (row, _) in enumerate(chosen):
        if row.example.response is not None and row.severity_mask.all():
            answers[normalise(row.example.prompt)].append(index)
    level = [float(row.severity.sum()) for row, _ in chosen]
    units, placed = [], set()
    for group in answers.values():
        group.sort(key=level.__getitem__)
        if level[group[-1]] - level[group[0]] < APART:
            continue
        padded = _longest([chosen[i] for i in group]) * len(group)
        parts = math.ceil(padded / tokens)
        units += [[chosen[i] for i in group[part::parts]] for part in range(parts)]
        placed.update(group)
    return units + [[pair] for index, pair in enumerate(chosen) if index not in placed]


def _pick_window(row: Encoded, how: Batching, rng: random.Random) -> Window:
    window = row.windows[0]
    if len(row.windows) > 1 and rng.random() < how.random_window:
        window = rng.choice(row.windows[1:])
    if row.example.unsafe is False and how.prefix and rng.random() < how.prefix:
        first = sum(s == 0 for s in window.segments)  # BERT's prompt; the cut falls after it
        if row.example.response is not None and first < len(window.ids) - 8:
            keep = rng.randint(first + 6, len(window.ids) - 1)
            ids = [*window.ids[:keep], window.ids[-1]]
            return Window(ids, window.segments[: len(ids)], window.start, window.end)
    return window


def tensors(rows: Sequence[Encoded], windows: Sequence[Window], pad_id: int) -> dict[str, Tensor]:
    arrays: dict[str, Any] = dict(pad(windows, pad_id))
    for name in ("severity", "severity_mask", "categories", "category_mask"):
        arrays[name] = np.stack([getattr(row, name) for row in rows])
    arrays["weight"] = np.array([row.example.weight for row in rows], np.float32)
    answers = [row.example.response is not None for row in rows]
    _, prompt = np.unique([normalise(row.example.prompt) for row in rows], return_inverse=True)
    # A prompt alone is no answer to anything: it gets a number of its own.
    arrays["prompt"] = np.where(answers, prompt, -1 - np.arange(len(rows)))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@torch.inference_mode()
def predict(
    model: nn.Module, rows: Sequence[Encoded], pad_id: int, *, bf16: bool, tokens: int = 8192
) -> tuple[np.ndarray, np.ndarray]:
    """Logits per text, the highest over its windows: severity (n, 3), categories (n, 19)."""
    model.eval()
    flat = sorted(
        ((index, window) for index, row in enumerate(rows) for window in row.windows),
        key=lambda item: len(item[1].ids),
    )
    severity = np.full((len(rows), 3), -np.inf, np.float32)
    categories = np.full((len(rows), 19), -np.inf, np.float32)
    device = next(model.parameters()).device
    while flat:
        size = max(1, tokens // len(flat[-1][1].ids))
        part, flat = flat[-size:], flat[:-size]
        batch = {
            k: torch.from_numpy(v).to(device) for k, v in pad([w for _, w in part], pad_id).items()
        }
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            s, c = model(**batch)
        for (index, _), row_s, row_c in zip(part, s.float().cpu(), c.float().cpu(), strict=True):
            severity[index] = np.maximum(severity[index], row_s.numpy())
            categories[index] = np.maximum(categories[index], row_c.numpy())
    return severity, categories
