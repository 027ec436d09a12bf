"""Several people's labels as one."""

from __future__ import annotations

from training.annotation.labels import SafetyLabel
from training.annotation.resolve import combine


def unsafe(*categories: str) -> SafetyLabel:
    return SafetyLabel(False, 2, categories)


def test_categories_that_half_of_them_name_stand() -> None:
    both = combine([unsafe("Violence", "Drugs"), unsafe("Drugs")])
    assert both == unsafe("Violence", "Drugs")
    assert combine([unsafe("Drugs"), unsafe("Drugs"), unsafe("Violence")]) == unsafe("Drugs")


def test_where_each_names_another_category_it_is_not_known_and_not_none() -> None:
    split = combine([unsafe("Violence"), unsafe("Drugs"), unsafe("Cybercrime")])
    assert split == SafetyLabel(False, 2, None)
