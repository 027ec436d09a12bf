"""The HTML page of a scan: one file that asks nothing of a network, plots as inline SVG. Pure.

Numbers only: what the texts say is on it only where the tally holds excerpts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from guardrail import __version__
from guardrail._scan_tally import BINS, Tally
from guardrail.policy import LEVELS
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Action

__all__ = ["page"]

_WIDTH = 640  # of a plot, in SVG units
_COLOURS = {
    Action.ALLOW: "#3a9d5d",
    Action.FLAG: "#d9a514",
    Action.REDACT: "#a05195",
    Action.REGENERATE: "#665191",
    Action.REFUSE: "#c23b3b",
}
_SHADES = {
    Severity.NONE: "#3a9d5d",
    Severity.MINOR: "#e8b84a",
    Severity.MODERATE: "#e0793b",
    Severity.SEVERE: "#b3261e",
}
_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}
th,td{padding:.25rem .6rem;border-bottom:1px solid #8884;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;display:block}svg text{fill:currentColor;font-size:12px}
.key span{display:inline-block;margin-right:1rem}
.key i{display:inline-block;width:.8em;height:.8em;margin-right:.3em}
.note{opacity:.75;font-size:.9rem}td.t{white-space:pre-wrap;overflow-wrap:anywhere}
"""


def page(tally: Tally, *, source: str, policy: str, model: str) -> str:
    """The report as one HTML document."""
    title = f"Scan of {source}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>policy {escape(policy)}, model {escape(model)}, guardrail {escape(__version__)}</p>",
        _figures(tally),
        "<h2>What the policy decided</h2>",
        _stacked({"": {a.value: (tally.actions[a], _COLOURS[a]) for a in Action}}),
        "<h2>Severity by direction</h2>",
        _stacked({d.value: _severities(tally, d) for d in Direction}),
        "<h2>Texts held, by category and severity</h2>",
        _grid(tally),
        "<h2>Probability of any harm</h2>",
        _histogram(tally.unsafe),
        _problems(tally),
        _worst(tally),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(part for part in parts if part)
        + "</body></html>\n"
    )


def _figures(tally: Tally) -> str:
    figures = {
        "rows": tally.rows,
        "verdicts": tally.verdicts,
        "rows with errors": tally.errors,
        "judged by on_error alone": tally.degraded,
        "unreadable to the model": tally.unreadable,
    }
    return _table(["", "number"], ([name, f"{n:,}"] for name, n in figures.items()), numbers={1})


def _severities(tally: Tally, direction: Direction) -> dict[str, tuple[int, str]]:
    return {s.label: (tally.severities[direction, s], _SHADES[s]) for s in Severity}


def _stacked(bars: Mapping[str, Mapping[str, tuple[int, str]]]) -> str:
    """One bar per name, of labelled counts in colours; their key with the numbers below."""
    drawn: list[str] = []
    keys: list[str] = []
    for name, counts in bars.items():
        total = sum(n for n, _ in counts.values())
        if not total:
            continue
        top, left = 34 * len(drawn), 0.0
        shapes = [f'<text x="0" y="{top + 19}">{escape(name)}</text>'] if name else []
        room = _WIDTH - (60 if name else 0)
        for label, (n, colour) in counts.items():
            width = room * n / total
            shapes.append(
                f'<rect x="{_WIDTH - room + left:.2f}" y="{top}" width="{width:.2f}" height="28" '
                f'fill="{colour}"><title>{escape(label)}: {n:,}</title></rect>'
            )
            left += width
        drawn.append("".join(shapes))
        words = (
            f'<span><i style="background:{colour}"></i>{escape(label)} {n:,} '
            f"({100 * n / total:.2f} %)</span>"
            for label, (n, colour) in counts.items()
        )
        keys.append(f'<p class="key">{escape(name)} {"".join(words)}</p>')
    if not drawn:
        return "<p>No verdicts.</p>"
    return _svg(34 * len(drawn), "".join(drawn), "shares") + "".join(keys)


def _grid(tally: Tally) -> str:
    held = [c for c in Category if any(tally.held[c, level] for level in LEVELS)]
    if not held:
        return "<p>None.</p>"
    held.sort(key=lambda c: -sum(tally.held[c, level] for level in LEVELS))
    most = sum(tally.held[held[0], level] for level in LEVELS)
    rows = []
    for category in held:
        counts = [tally.held[category, level] for level in LEVELS]
        cells = "".join(f'<td class="n">{n:,}</td>' for n in counts)
        rows.append(
            f"<tr><td>{escape(category.value)}</td>{cells}<td>{_bar(counts, most)}</td></tr>"
        )
    heads = "".join(f'<th class="n">{level.label}</th>' for level in LEVELS)
    return (
        f'<table><tr><th>category</th>{heads}<th style="width:30%"></th></tr>{"".join(rows)}'
        '</table><p class="note">A text counts in every category held against it.</p>'
    )


def _bar(counts: Sequence[int], most: int) -> str:
    left, shapes = 0.0, []
    for level, n in zip(LEVELS, counts, strict=True):
        width = 200 * n / most
        shapes.append(
            f'<rect x="{left:.2f}" y="0" width="{width:.2f}" height="14" fill="{_SHADES[level]}"/>'
        )
        left += width
    return f'<svg viewBox="0 0 200 14" role="img" aria-label="share">{"".join(shapes)}</svg>'


def _histogram(bins: Sequence[int]) -> str:
    """Heights are square roots: the harmless bin would hide the rest."""
    most = max([*bins, 1])
    step = _WIDTH / BINS
    shapes = []
    for index, n in enumerate(bins):
        height = 140 * (n / most) ** 0.5
        low, high = index / BINS, (index + 1) / BINS
        shapes.append(
            f'<rect x="{index * step + 1:.2f}" y="{150 - height:.2f}" width="{step - 2:.2f}" '
            f'height="{height:.2f}" fill="#5b7db1"><title>{low:.2f} to {high:.2f}: {n:,}</title>'
            "</rect>"
        )
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        anchor = {0.0: "start", 1.0: "end"}.get(tick, "middle")
        shapes.append(
            f'<text x="{tick * _WIDTH:.0f}" y="166" text-anchor="{anchor}">{tick:g}</text>'
        )
    note = '<p class="note">Heights are square roots of counts. Point at a bar for its count.</p>'
    return _svg(170, "".join(shapes), "histogram of the probability of any harm") + note


def _problems(tally: Tally) -> str:
    if not tally.problems:
        return ""
    rows = ([kind, f"{n:,}"] for kind, n in tally.problems.most_common())
    return "<h2>Rows that could not be judged</h2>" + _table(["why", "rows"], rows, numbers={1})


def _worst(tally: Tally) -> str:
    if not tally.worst:
        return ""
    heads = ["row", "field", "severity", "P(unsafe)", "category"]
    shown = any(entry.text is not None for entry in tally.worst)
    rows = (
        [
            f"{entry.row:,}",
            entry.field,
            entry.severity.label,
            f"{entry.probability:.3f}",
            entry.category,
            *([entry.text or ""] if shown else []),
        ]
        for entry in tally.worst
    )
    table = _table(heads + ["text"] * shown, rows, numbers={0, 3})
    return f"<h2>Look at these first</h2>{table}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: set[int]) -> str:
    def cell(tag: str, index: int, text: str) -> str:
        kind = ' class="n"' if index in numbers else ' class="t"' if heads[index] == "text" else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    lines = [[cell("th", i, head) for i, head in enumerate(heads)]]
    lines += [[cell("td", i, text) for i, text in enumerate(row)] for row in rows]
    return f"<table>{''.join('<tr>' + ''.join(cells) + '</tr>' for cells in lines)}</table>"


def _svg(height: int, shapes: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f"{shapes}</svg>"
    )
