"""Preferences: what each source becomes, that nothing leaks over splits, and clear errors."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("tyro")

import tiny_preferences
from hypothesis import given
from hypothesis import strategies as st

from training.data import Example, normalise, write_examples
from training.preference_rows import from_annotated, from_chosen, from_pku, merge, swapped
from training.preferences import (
    Demonstration,
    Preference,
    build,
    help_pairs,
    load_demonstrations,
    load_pairs,
    read_demonstrations,
    read_pairs,
    read_preferences,
    refuse_flipped,
    refuses,
    split_map,
)

ROW = {
    "prompt": "How do I get revenge?",
    "response_0": "Slash their tyres.",
    "response_1": "Let it go; talk to a friend.",
    "response_0_severity": 2,
    "response_1_severity": 0,
    "more_helpful": 0,
    "less_harmful": 1,
}
side = st.sampled_from([0, 1, None])
level = st.sampled_from([0, 1, 2, 3])


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    severity = draw(st.tuples(level, level))
    return Preference(
        prompt=draw(st.sampled_from(["a", "b"])),
        answers=draw(st.sampled_from([("x", "y"), ("y", "x"), ("x", "z")])),
        source="test",
        more_helpful=draw(side),
        less_harmful=draw(side),
        severity=severity,
        unsafe=(severity[0] > 0, severity[1] > 0),
    )


def test_an_annotated_pair_keeps_both_questions_apart() -> None:
    p = from_annotated(ROW)
    assert (p.more_helpful, p.less_harmful, p.unsafe) == (0, 1, (True, False))
    assert p.conflicting
    assert p.safer == 1


def test_a_chosen_answer_counts_for_its_dimension_alone() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "source": "s", "dimension": "helpful"}
    assert (from_chosen(row).more_helpful, from_chosen(row).less_harmful) == (0, None)
    del row["dimension"]
    assert (from_chosen(row).more_helpful, from_chosen(row).less_harmful) == (None, 0)


def test_rows_kept_to_validate_severity_are_left_out() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "source": "upsrm_pku_test"}
    assert from_chosen(row) is None


def test_a_pku_row_maps_onto_the_same_fields() -> None:
    p = from_pku(
        {
            "prompt": "p",
            "response_0": "a",
            "response_1": "b",
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            "response_1_severity_level": 3,
            "better_response_id": 1,
            "safer_response_id": 0,
        }
    )
    assert (p.severity, p.unsafe, p.conflicting) == ((0, 3), (False, True), True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_1": None}, "no 'response_1'"),
        ({"response_1": "  "}, "no 'response_1'"),
        ({"prompt": None}, "no 'prompt'"),
        ({"less_harmful": 2}, "less_harmful is 2"),
        ({"less_harmful": ...}, "no 'less_harmful'"),
        ({"response_0_severity": 7}, "response_0_severity is 7"),
        ({"more_helpful": True}, "more_helpful is True"),
    ],
)
def test_a_row_lacking_a_side_is_named_with_its_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    bad = {k: v for k, v in (ROW | change).items() if v is not ...}
    tiny_preferences.write_rows(tmp_path / "annotated_pairs.jsonl", [ROW, bad])
    with pytest.raises(SystemExit, match=rf"annotated_pairs.jsonl:2: .*{message}"):
        load_pairs(str(tmp_path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    tiny_preferences.write_rows(tmp_path / "annotated_pairs.jsonl", [ROW])
    with pytest.raises(SystemExit, match=r"preferences.jsonl.gz is missing"):
        load_pairs(str(tmp_path))


@pytest.mark.parametrize(
    ("helpful", "harmless", "severity", "expected"),
    [
        (0, 0, (1, 2), 0),  # agreed
        (0, None, (2, 2), 0),
        (None, 1, (2, 2), 1),
        (None, None, (0, 0), None),
        (0, 1, (1, 0), 0),  # a little harm for help
        (0, 1, (2, 0), 1),  # too much of it
        (0, 1, (3, 2), 0),
        (1, 0, (None, None), 0),  # unknown: the cautious side
    ],
)
def test_the_single_label_trades_help_against_harm(
    helpful: int | None,
    harmless: int | None,
    severity: tuple[int | None, int | None],
    expected: int | None,
) -> None:
    p = Preference("p", ("a", "b"), "s", helpful, harmless, severity)
    assert p.trade_off == expected


@given(preferences())
def test_swapping_the_answers_swaps_every_label(p: Preference) -> None:
    other = swapped(p)
    assert swapped(other) == p
    for name in ("more_helpful", "less_harmful", "trade_off", "safer"):
        ours, theirs = getattr(p, name), getattr(other, name)
        assert theirs == (None if ours is None else 1 - ours)
    assert other.conflicting == p.conflicting


@given(st.lists(preferences(), max_size=8))
def test_merging_keeps_one_row_per_pair_of_answers_and_loses_no_label(
    rows: list[Preference],
) -> None:
    merged = merge(rows)
    keys = [(p.prompt, *sorted(p.answers)) for p in merged]
    assert len(keys) == len(set(keys)) == len({(p.prompt, *sorted(p.answers)) for p in rows})
    for key, p in zip(keys, merged, strict=True):
        same = [r for r in rows if (r.prompt, *sorted(r.answers)) == key]
        for name in ("more_helpful", "less_harmful"):
            assert (getattr(p, name) is None) == all(getattr(r, name) is None for r in same)


def test_what_a_pair_does_not_know_is_taken_from_one_with_its_answers_the_other_way_round() -> None:
    known = Preference("p", ("a", "b"), "s", more_helpful=0, unsafe=(None, False))
    more = Preference("p", ("b", "a"), "t", None, 0, severity=(0, 2), unsafe=(True, True))
    (found,) = merge([known, more])
    assert (found.more_helpful, found.less_harmful) == (0, 1)
    assert (found.severity, found.unsafe) == ((2, 0), (True, False))


def test_two_equal_answers_are_no_preference() -> None:
    assert merge([Preference("p", ("Yes!", "yes"), "s", 0)]) == []


def test_known_prompts_keep_their_split_and_new_ones_join_those_like_them() -> None:
    words = [f"w{n}" for n in range(10)]
    held_out, near = " ".join(words), " ".join([*words, "more"])
    splits = split_map({held_out: "test", "other": "train"}, [near, "other", "brand new prompt"])
    assert splits[held_out] == splits[near] == "test"
    assert splits["other"] == "train"
    assert splits["brand new prompt"] in ("train", "validation", "test")


def test_a_new_prompt_between_two_splits_is_held_out() -> None:
    first = " ".join(f"w{n}" for n in range(10))
    second = " ".join(f"w{n}" for n in range(2, 12))
    bridge = " ".join(f"w{n}" for n in range(1, 11))
    known = {first: "train", second: "validation"}
    assert split_map(known, [bridge])[bridge] == "validation"


def test_build_gives_every_prompt_the_split_of_the_moderation_data(tmp_path: Path) -> None:
    prompts = {"train": "how do I rob a bank", "test": "how do I poison a dog"}
    for split in ("train", "validation", "test"):
        known = [Example(prompts[split], "x", "s", split=split)] if split in prompts else []
        write_examples(tmp_path / "data" / f"{split}.jsonl", known)
    source = tmp_path / "source"
    rows = [ROW | {"prompt": prompt + "?"} for prompt in prompts.values()]
    tiny_preferences.write_rows(source / "annotated_pairs.jsonl", rows)
    chosen = {"chosen": "No.", "rejected": "Yes, do.", "source": "s"}
    tiny_preferences.write_rows(
        source / "preferences.jsonl", [chosen | {"prompt": prompts["train"]}]
    )
    tiny_preferences.write_rows(
        source / "hh_harmless_pairs.jsonl", [chosen | {"prompt": "Human: hello there"}]
    )
    tiny_preferences.write_rows(
        source / "annotated_responses.jsonl",
        [
            {
                "prompt": prompt,
                "response": "I'm sorry, but I can't help with that.",
                "severity": 0,
                "human_safe": True,
                "source": "spard_refusal",
            }
            for prompt in prompts.values()
        ],
    )
    tiny_preferences.write_rows(
        source / "benign.jsonl",
        [{"prompt": "Name a colour.", "response": "Blue.", "source": "dolly"}],
    )
    build(str(source), tmp_path / "data", tmp_path / "out")
    for split in ("train", "test"):
        pairs = read_preferences(tmp_path / "out", split)
        assert normalise(prompts[split]) in {normalise(p.prompt) for p in pairs}
        shown = read_demonstrations(tmp_path / "out", split)
        assert [d.prompt for d in shown if d.kind == "refusal"] == [prompts[split]]
    everything = read_preferences(tmp_path / "out", "train", "validation", "test")
    assert len(everything) == 4
    card = (tmp_path / "out" / "card.md").read_text()
    assert "| source | split | pairs | helpful | harmless | both | conflicting |" in card
    assert "| annotated_pairs | train | 1 | 1 | 1 | 1 | 1 |" in card


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tiny_preferences.write(tmp_path)
    assert read_preferences(tmp_path, "train")[3] == tiny_preferences.pair(3)
    assert read_demonstrations(tmp_path, "train")[5] == tiny_preferences.demonstration(5)


def test_a_file_of_own_pairs_with_one_answer_is_refused(tmp_path: Path) -> None:
    row = asdict(tiny_preferences.pair(0)) | {"answers": ["only one"]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    with pytest.raises(SystemExit, match=r"own.jsonl:1: answers are not two texts"):
        read_pairs(tmp_path / "own.jsonl")


def test_a_pair_that_answers_neither_question_and_a_file_that_is_no_text_are_refused(
    tmp_path: Path,
) -> None:
    row = {"prompt": "p", "answers": ["a", "b"], "source": "s"}
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row | {"less_harmful": 0}))
    assert read_pairs(path)[0].less_harmful == 0
    path.write_text(json.dumps(row))
    with pytest.raises(SystemExit, match=r"own.jsonl:1: neither more_helpful nor less_harmful"):
        read_pairs(path)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(SystemExit, match=r"own.jsonl: damaged, or no text in UTF-8"):
        read_pairs(path)
    with pytest.raises(SystemExit, match="is missing: a file of preferences"):
        read_pairs(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "no 'prompt'"),
        ({"answers": "ab"}, "answers are not two texts"),
        ({"answers": ["a", None]}, "answers are not two texts"),
        ({"answers": ["a", "half \ud83d"]}, "surrogates not allowed"),
        ({"more_helpful": 5}, "more_helpful is 5, not one of 0, 1, null"),
        ({"more_helpful": "0"}, "more_helpful is '0'"),
        ({"less_harmful": True}, "less_harmful is True"),
        ({"unsafe": [True]}, r"unsafe is \[True\], not a list of two"),
        ({"unsafe": [1, 0]}, "unsafe is 1"),
        ({"severity": [0, 4]}, "severity is 4"),
        ({"split": "dev"}, "split is 'dev'"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_preference_with_a_wrong_field_is_named_with_its_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    good = asdict(tiny_preferences.pair(0))
    tiny_preferences.write_rows(tmp_path / "own.jsonl", [good, good | change])
    with pytest.raises(SystemExit, match=rf"own.jsonl:2: .*{message}"):
        read_pairs(tmp_path / "own.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ...}, "no 'answer'"),
        ({"answer": None}, "no 'answer'"),
        ({"kind": "joke"}, "kind is 'joke'"),
    ],
)
def test_a_demonstration_with_a_wrong_field_is_named_with_its_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    good = asdict(tiny_preferences.demonstration(0))
    bad = {k: v for k, v in (good | change).items() if v is not ...}
    tiny_preferences.write_rows(tmp_path / "demonstrations.train.jsonl", [good, bad])
    with pytest.raises(SystemExit, match=rf"demonstrations.train.jsonl:2: .*{message}"):
        read_demonstrations(tmp_path, "train")


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "annotated_pairs.jsonl").write_text(json.dumps(ROW) + '\n["a", "b"]\n')
    with pytest.raises(SystemExit, match=r"annotated_pairs.jsonl:2: a list, not an object"):
        load_pairs(str(tmp_path))


@pytest.mark.parametrize("lacking", ["severity", "response"])
def test_an_answer_of_a_source_without_a_field_is_named_with_its_line(
    tmp_path: Path, lacking: str
) -> None:
    row = {"prompt": "p", "response": "a", "source": "s", "severity": 0, "human_safe": None}
    bad = {k: v for k, v in row.items() if k != lacking}
    tiny_preferences.write_rows(tmp_path / "annotated_responses.jsonl", [row, bad])
    with pytest.raises(SystemExit, match=rf"annotated_responses.jsonl:2: no '{lacking}'"):
        load_demonstrations(tmp_path, [])


def test_a_missing_file_of_own_pairs_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"own.jsonl is missing"):
        read_pairs(tmp_path / "own.jsonl")


def test_data_that_was_not_built_says_how(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"python -m training.preferences build"):
        read_preferences(tmp_path, "train")


def test_flipped_labels_are_refused() -> None:
    rows = [tiny_preferences.pair(n) for n in range(40)]
    refuse_flipped(rows)
    flipped = [
        p if p.less_harmful is None else replace(p, less_harmful=1 - p.less_harmful) for p in rows
    ]
    with pytest.raises(SystemExit, match="the labels are flipped"):
        refuse_flipped(flipped)


def test_help_pairs_prefer_help_to_refusals_and_to_foreign_answers() -> None:
    shown = [tiny_preferences.demonstration(n) for n in range(40)]
    answer_of = {d.prompt: d.answer for d in shown}
    refusals = {d.answer for d in shown if d.kind == "refusal"}
    pairs = help_pairs(shown, 20, 0, other="any")
    assert {p.source for p in pairs} == {"help/refusal", "help/foreign"}
    for p in pairs:
        assert p.more_helpful == 0
        assert p.answers[0] == answer_of[p.prompt] != p.answers[1]
        assert p.source != "help/refusal" or p.answers[1] in refusals
        assert p.unsafe == (False, False)
    assert all(p.source == "help/refusal" for p in help_pairs(shown, 9, 0, other="refusal"))


def test_without_refusals_there_are_no_help_pairs() -> None:
    assert help_pairs([Demonstration("p", "a", "benign", "s")], 5, 0, other="refusal") == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("It is illegal to do so.", True),
        ("You should never do that; talk to someone.", True),
        ("Mix flour and water, then bake it.", False),
        ("Mix flour and water. " * 20 + "I'm sorry.", False),  # late words do not refuse
    ],
)
def test_refusals_are_told_by_their_first_sentences(answer: str, expected: bool) -> None:
    assert refuses(answer) is expected
