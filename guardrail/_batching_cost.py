"""What a batch costs in time, learnt from those judged lately. Pure arithmetic, no clock."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cost"]

_KEPT = 0.95  # of the weight of what was seen before, with each batch: the last twenty or so count
_SPREAD = 1e-6  # of the mean square: sizes closer together than this tell nothing of the slope


@dataclass(slots=True)
class Cost:
    """A line through (size, seconds) of batches: least squares, older batches counting less.

    Sizes are in characters. The line tells what every batch costs, whatever is in it (a network, a
    kernel's start), from what company adds; only the latter is a reason for small batches.
    """

    _n: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def learn(self, size: int, seconds: float) -> None:
        self._n = self._n * _KEPT + 1
        self._x = self._x * _KEPT + size
        self._y = self._y * _KEPT + seconds
        self._xx = self._xx * _KEPT + size * size
        self._xy = self._xy * _KEPT + size * seconds

    @property
    def average(self) -> float:
        """Seconds per character as batches are made now; 0 before the first."""
        return self._y / self._x if self._x else 0.0

    @property
    def marginal(self) -> float:
        """Seconds that one more character adds to a batch; 0 where nothing is known."""
        if not self._n:
            return 0.0
        x, y, xx, xy = (s / self._n for s in (self._x, self._y, self._xx, self._xy))
        spread = xx - x * x
        if spread <= _SPREAD * xx:
            return 0.0
        return min(max(0.0, (xy - x * y) / spread), self.average)
