"""An evaluation's figures as Markdown, and as the blocks of a model card. Pure but for one file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]

_KINDS = {
    "annotated": "Against annotated labels (AI, by the rubric)",
    "human": "Against human labels",
    "harmless": "Harmless texts: what is flagged",
    "public": "Parts of public benchmarks",
    "written": "Abuse and plain talk, written and labelled for this by an AI",
}
_COLUMNS: dict[str, tuple[str, ...]] = {
    "annotated": (
        "n", "unsafe", "f1", "auroc", "auprc", "recall", "recall_at_1_fpr", "recall_at_5_fpr",
        "fpr", "ece", "ece_by_chance",
    ),
    "human": (
        "n", "unsafe", "f1", "auroc", "auprc", "recall", "recall_at_1_fpr", "recall_at_5_fpr",
        "fpr", "ece",
    ),
    "harmless": ("n", "fpr"),
    "public": (
        "n", "unsafe", "f1", "auroc", "auprc", "recall", "recall_at_1_fpr", "recall_at_5_fpr",
        "fpr", "ece",
    ),
    "written": ("n", "unsafe", "f1", "auroc", "recall", "fpr"),
}  # fmt: skip
_SEVERITY = (
    "kappa", "severity_macro_f1", "severity_exact", "off_by_two", "grave_recall", "severe_caught",
    "category_f1", "category_macro_f1",
)  # fmt: skip
_HEADS = {
    "unsafe": "harmful", "f1": "F1", "auroc": "AUROC", "auprc": "AUPRC", "ece": "ECE",
    "recall_at_1_fpr": "recall at 1 % fpr", "recall_at_5_fpr": "recall at 5 % fpr",
    "ece_by_chance": "ECE by chance", "kappa": "quadratic kappa", "severity_macro_f1": "macro F1",
    "severity_exact": "exact", "off_by_two": "off by two", "grave_recall": "moderate+ caught",
    "severe_caught": "severe caught", "category_f1": "19 categories, micro F1",
    "category_macro_f1": "macro F1 of categories", "kept": "recall kept",
    "reached": "reached", "ece_before": "ECE without", "ece_after": "ECE with",
    "log_loss_before": "log-loss without", "log_loss_after": "log-loss with",
    "kept_or_unreadable": "kept or unreadable", "fpr": "harmless flagged",
    "plain_n": "plain sentences", "plain": "flagged", "plain_worst": "most", "plain_of": "of",
    "hate_n": "hateful ones", "hate": "found", "hate_worst": "fewest", "hate_of": "of",
}  # fmt: skip
PLOTS = {
    "severity-confusion": "Severity called against severity annotated",
    "reliability": "Reliability before and after calibration",
    "precision-recall": "Precision and recall",
}


def markdown(figures: Figures, *, plots: bool = False) -> str:
    """The whole report; plots: with the pictures that `--docs` draws."""
    part = f"at most {figures['limit']} texts a set" if figures["limit"] else "all texts"
    split = figures["split"]
    lines = [
        f"# Evaluation of {figures['model']}",
        "",
        f"`python -m training.evaluate`: the {split} split, {part}, the exported artifact"
        " with its own calibration and thresholds. In brackets 95 % intervals by bootstrap over"
        " prompts (of moderate and severe texts caught: exact ones). fpr, harmless flagged: share"
        " of harmless texts that are flagged at all. ECE by chance: what a perfectly calibrated"
        " model would show on so few texts.",
    ]
    for kind, title in _KINDS.items():
        lines += _section(title, sets_of(figures, kind, _COLUMNS[kind]))
    lines += _section("Severity and categories", severity_of(figures))
    lines += _section("Probabilities, without calibration and with it", calibration_of(figures))
    lines += _section("Size, parity and speed", artifact_of(figures))
    if plots:
        lines += ["", *(f"![{text}](evaluation/{name}.png)" for name, text in PLOTS.items())]
    lines += _section("Disguises", robustness_of(figures))
    lines += _section("How early in an answer", prefixes_of(figures))
    lines += _section("The same sentences about groups of people", groups_of(figures))
    lines += _section("Per category (annotated answers)", categories_of(figures))
    for name, row in figures["sets"].items():
        if len(row.get("by_tag", ())) > 1:
            columns = (
                "n", "unsafe", "f1", "auroc", "auprc", "recall", "recall_at_1_fpr",
                "recall_at_5_fpr", "fpr",
            )  # fmt: skip
            lines += _section(f"{name}, apart", grid("part", row["by_tag"], columns))
    return "\n".join(lines) + "\n"


def _section(title: str, body: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *body] if body else []


def grid(first: str, rows: Mapping[str, Figures], columns: Iterable[str]) -> list[str]:
    """A Markdown table, a row per name; columns that no row has are left out."""
    if not rows:
        return []
    shown = [c for c in columns if any(row.get(c) is not None for row in rows.values())]
    lines = [f"| {first} | " + " | ".join(_HEADS.get(c, c) for c in shown) + " |"]
    lines.append("|---" * (len(shown) + 1) + "|")
    lines += [
        f"| {name.replace('|', '/')} | " + " | ".join(cell(row, c) for c in shown) + " |"
        for name, row in rows.items()
    ]
    return lines


def cell(row: Figures, column: str) -> str:
    """The figure, with its interval where it has one; - where there is none."""
    value = row.get(column)
    if value is None or isinstance(value, int | str):
        return "-" if value is None else str(value)
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.2f}-{high:.2f})"


def sets_of(figures: Figures, kind: str, columns: Sequence[str]) -> list[str]:
    rows = {name: row for name, row in figures["sets"].items() if row["kind"] == kind}
    return grid("set", rows, ("labels", *columns))


def severity_of(figures: Figures) -> list[str]:
    rows = {name: row for name, row in figures["sets"].items() if row.get("kappa") is not None}
    return grid("set", rows, ("labels", "n", *_SEVERITY))


def calibration_of(figures: Figures) -> list[str]:
    """A row per set and severity level, in sets that have severities."""
    rows = {
        f"{name}, at least {level}": row
        for name, each in figures["sets"].items()
        for level, row in each.get("calibration", {}).items()
    }
    columns = ("n", "reached", "ece_before", "ece_after", "ece_by_chance")
    return grid("probability", rows, (*columns, "log_loss_before", "log_loss_after"))


def artifact_of(figures: Figures) -> list[str]:
    """What the manifest says of the file, but for devices that were not measured."""
    known = figures.get("artifact", {})
    lines = [f"- {known['megabytes']} MB"] if "megabytes" in known else []
    if parity := known.get("parity"):
        lines.append(
            f"- {parity['precision']} decides as fp32 does on {parity['equal']:.2%} of "
            f"{parity['texts']} texts; no severity moved by more than {parity['largest_step']}"
        )
    speed = known.get("speed", {})
    for device, row in speed.items():
        if isinstance(row, dict) and "ms_by_tokens" in row:
            each = ", ".join(f"{ms} ms for {n} tokens" for n, ms in row["ms_by_tokens"].items())
            lines.append(
                f"- {device}: {each}; {row['texts_per_second']} texts a second ({speed['machine']},"
                f" under a load of {speed['load']})"
            )
    return lines


def categories_of(figures: Figures) -> list[str]:
    rows = figures["sets"].get("annotated answers", {}).get("categories", {})
    columns = ("n", "f1", "auroc", "auprc", "recall", "recall_at_1_fpr", "recall_at_5_fpr")
    return grid("category", rows, columns)


def robustness_of(figures: Figures) -> list[str]:
    rows = {row["disguise"]: row for row in figures["robustness"]}
    return grid(
        "disguise", rows, ("n", "recall", "kept", "unreadable", "kept_or_unreadable", "fpr")
    )


def prefixes_of(figures: Figures) -> list[str]:
    """Texts x shares: caught by then."""
    table = figures["prefixes"]
    if not table:
        return []
    shares = [f"{row['share']:.0%}" for row in next(iter(table.values()))]
    lines = ["| answers flagged by the first | " + " | ".join(shares) + " |"]
    lines.append("|---" * (len(shares) + 1) + "|")
    for name, rows in table.items():
        lines.append(f"| {name} | " + " | ".join(f"{row['caught']:.3f}" for row in rows) + " |")
    return lines


def groups_of(figures: Figures) -> list[str]:
    """A row per kind of group, with the group for which it is worst."""
    rows = {row["axis"]: row for row in figures.get("groups", ())}
    each = [f"{name}{part}" for name in ("plain", "hate") for part in ("_n", "", "_worst", "_of")]
    return grid("about", rows, ("groups", *each))


# --- model card ----------------------------------------------------------------------------------

_BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_card(path: Path, figures: Figures) -> None:
    """Replace what stands between `<!-- figures: NAME -->` and `<!-- end -->`. A card without such
    marks, or with one that names nothing, is an error."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: --card fills in a card that is there")
    path.write_text(filled(path.read_text(encoding="utf-8"), figures), encoding="utf-8")


def filled(card: str, figures: Figures) -> str:
    """The card with its blocks made anew. Raises SystemExit."""
    blocks = {
        "model": [f"`{figures['model']}`, {figures['split']} split."],
        "severity": severity_of(figures),
        "calibration": calibration_of(figures),
        "artifact": artifact_of(figures),
        "categories": categories_of(figures),
        "robustness": robustness_of(figures),
        "prefixes": prefixes_of(figures),
        "groups": groups_of(figures),
    } | {kind: sets_of(figures, kind, columns) for kind, columns in _COLUMNS.items()}
    names = [match[2] for match in _BLOCK.finditer(card)]
    unknown = sorted(set(names) - set(blocks))
    if unknown or not names:
        what = f"has unknown blocks {unknown}" if unknown else "has no `<!-- figures: NAME -->`"
        raise SystemExit(f"the model card {what}; there are {', '.join(blocks)}")

    def block(match: re.Match[str]) -> str:
        body = "\n".join(blocks[match[2]] or ["(not measured: the sets are not there)"])
        return f"{match[1]}{body}\n{match[3]}"

    return _BLOCK.sub(block, card)
