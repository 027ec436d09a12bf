"""Where the settings of `guardrail serve` come from: so an error can name file, line and key."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from guardrail._toml import read_toml
from guardrail.errors import GuardrailError

__all__ = ["ConfigError", "Location", "Source", "holds", "line_of"]

Location = tuple[str | int, ...]
_MOST = 20  # mistakes that are told at once


class ConfigError(GuardrailError, ValueError):
    """The settings say something they cannot mean; the text names file, line and key."""


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A TOML file and the options that went over it. All are equal: settings that say the same are,
    wherever they were read.

    data: what the file says. given: keys, of the top or of a table, that options gave.
    """

    where: str = dataclasses.field(default="settings", compare=False)
    text: str = dataclasses.field(default="", compare=False)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    given: frozenset[Location] = dataclasses.field(default=frozenset(), compare=False)

    @classmethod
    def read(cls, path: Path | None, options: Mapping[str, Any]) -> Source:
        """Raises ConfigError."""
        given = frozenset(
            at
            for name, value in options.items()
            for at in ([(name, key) for key in value] if isinstance(value, Mapping) else [(name,)])
        )
        if path is None:
            return cls(given=given)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        try:
            return cls(str(path), text, read_toml(text), given)
        except ValueError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from None

    def is_given(self, at: Location) -> bool:
        """Whether an option said so, not the file."""
        return at[:1] in self.given or at[:2] in self.given

    def says(self, at: Location) -> bool:
        """Whether the file or an option has this key."""
        return self.is_given(at) or holds(self.data, at)

    def error(self, problems: Iterable[tuple[Location, str]]) -> ConfigError:
        """The first of them in one, each with its line where the file has it."""
        found = list(problems)
        lines = []
        for at, message in found[:_MOST]:
            where = "settings" if self.is_given(at) else self.where
            line = None if self.is_given(at) else line_of(self.text, at)
            where += "" if line is None else f", line {line}"
            lines.append(f"{where}: key '{_dotted(at)}': {message}")
        if len(found) > _MOST:
            lines.append(f"and {len(found) - _MOST:,} more mistakes")
        return ConfigError("; ".join(lines))


def line_of(text: str, at: Location) -> int | None:
    """The line (from 1) on which the entry at `at` begins, or the nearest table around it; None
    where the text has none of it. Asks the TOML parser itself: of the first lines alone, the
    fewest that hold the entry end with it."""
    lines = text.split("\n")

    def parsed(n: int) -> Any:
        try:
            return tomllib.loads("\n".join(lines[:n]))
        except tomllib.TOMLDecodeError:
            return None  # inside a value of several lines

    whole = parsed(len(lines))
    while at and not holds(whole, at):
        at = at[:-1]
    if not at:
        return None
    # Bisected, for a config may have thousands of keys: no entry before `low`, one by `high`.
    before, low, high = 0, 0, len(lines)
    while high - low > 1:
        middle = n = (low + high) // 2
        while n > low and (data := parsed(n)) is None:
            n -= 1
        if n == low:
            low = middle
        elif holds(data, at):
            high = n
        else:
            before = low = n
    return before + 1


def holds(data: Any, at: Location) -> bool:
    for part in at:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _dotted(at: Location) -> str:
    """`keys[1].hash`, counted from 1 as people do."""
    out = ""
    for part in at:
        out += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if out else part
    return out
