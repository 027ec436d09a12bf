"""What `training.moderation` refuses before it trains, in a line each: arguments that mean nothing,
and no texts to train on or to measure by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.moderation import Args

_ABOVE_ZERO = ("epochs", "tokens_per_batch")
_NOT_BELOW_ZERO = (
    "learning_rate", "head_learning_rate", "layer_decay", "weight_decay", "category_weight",
    "focal", "r_drop", "absent", "ranking", "in_prompt", "contrast",
)  # fmt: skip
_SHARES = (
    "answers", "balance", "warmup", "teacher_share", "people_share", "random_window", "prefix",
    "obfuscate", "framed", "average",
)  # fmt: skip
_AT_LEAST_ONE = ("layers", "limit")


def refuse_nonsense(args: Args) -> None:
    """SystemExit for an argument that no run can mean, such as no epoch."""
    for names, low, high, wanted in (
        (_ABOVE_ZERO, math.ulp(0.0), math.inf, "more than 0"),
        (_NOT_BELOW_ZERO, 0, math.inf, "0 or more"),
        (_SHARES, 0, 1, "from 0 to 1"),
        (_AT_LEAST_ONE, 1, math.inf, "1 or more"),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                option = f"--{name.replace('_', '-')}"
                raise SystemExit(f"{option} is {value}: it has to be {wanted}")
    try:
        _ = args.encoder
    except ValueError as error:
        raise SystemExit(f"--max-tokens, --prompt-tokens, --overlap: {error}") from None


def refuse_empty(chosen: Sequence[object], held_out: Sequence[object], data: Path) -> None:
    """SystemExit where there is nothing to train on, or to measure by."""
    if not chosen:
        raise SystemExit(f"{data}: --include and --answers leave no labelled text to train on")
    if not held_out:
        raise SystemExit(f"{data}: no text of annotated/ or pku/ in validation.jsonl to measure by")
