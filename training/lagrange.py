"""The Lagrange multiplier of a cost constraint: E[cost] <= limit. Nothing else is in here."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any


class LagrangeMultiplier:
    """lambda >= 0, kept as its logarithm, moved by how far the mean cost is from its limit.

        log lambda <- log lambda + rate * lambda * (J - limit)

    (Safe RLHF, Dai et al. 2024), where J is the mean cost of the newest batches of episodes, whole
    ones, since harmful and harmless prompts stand apart in one: as few as hold `window` episodes.
    lambda rises while the constraint is violated and falls while there is room. initial = 0 stays
    0: PPO without a constraint. `maximum` bounds what a constraint that cannot be met does.
    """

    def __init__(
        self,
        *,
        initial: float = 1.0,
        limit: float = 0.0,
        rate: float = 0.1,
        maximum: float = 10.0,
        window: int = 128,
    ) -> None:
        if not 0 <= initial <= maximum or rate < 0 or window < 1:
            raise ValueError(
                f"lambda must start within 0..{maximum:g} (not {initial:g}), its rate be >= 0 "
                f"(not {rate:g}) and its window >= 1 (not {window})"
            )
        self.limit, self.rate, self.maximum = limit, rate, maximum
        self._log = math.log(initial) if initial else -math.inf
        self._window = window
        self._batches: deque[list[float]] = deque()

    @property
    def value(self) -> float:
        return math.exp(self._log)

    @property
    def mean_cost(self) -> float:
        """J, the moving average; nan before the first episode."""
        costs = [cost for batch in self._batches for cost in batch]
        return sum(costs) / len(costs) if costs else math.nan

    def observe(self, costs: Iterable[float]) -> float:
        """Take in the costs of the newest batch of episodes, move, and return the new lambda."""
        self._batches.append(list(costs))
        while sum(map(len, self._batches)) - len(self._batches[0]) >= self._window:
            self._batches.popleft()
        if not math.isfinite(self.mean_cost):
            raise ValueError("the multiplier needs finite costs of at least one episode")
        step = self.rate * self.value * (self.mean_cost - self.limit)
        self._log = min(self._log + step, math.log(self.maximum) if self.maximum else -math.inf)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"log": self._log, "costs": [list(batch) for batch in self._batches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log = state["log"]
        self._batches = deque(list(batch) for batch in state["costs"])
