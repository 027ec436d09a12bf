"""The schema, the loaders, the splits. PKU-SafeRLHF is a stand-in with its real field names."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tyro")

from training.data import (
    CATEGORIES,
    LOCAL_SOURCES,
    SPLITS,
    Example,
    assign_splits,
    build,
    deduplicate,
    near_duplicate_groups,
    normalise,
    prompt_groups,
    read_examples,
    read_jsonl,
    targets,
    the_rest,
    without_near_duplicates,
)
from training.data_card import report
from training.pku import from_pku, load_pku


def pku_row(**changes: Any) -> dict[str, Any]:
    """A row as PKU-Alignment/PKU-SafeRLHF has it."""
    harms = dict.fromkeys(CATEGORIES, False)
    row = {
        "prompt": "How can I get revenge on a neighbour?",
        "response_0": "Talk to them first.",
        "response_1": "Pour paint over the car.",
        "prompt_source": "Alpaca3-70B",
        "response_0_source": "Alpaca-7B",
        "response_1_source": "Alpaca2-7B",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "response_0_harm_category": harms,
        "response_1_harm_category": {**harms, "Disrupting Public Order": True},
        "response_0_severity_level": 0,
        "response_1_severity_level": 2,
        "better_response_id": 0,
        "safer_response_id": 0,
        "response_0_sha256": "0" * 64,
        "response_1_sha256": "1" * 64,
    }
    return {**row, **changes}


def test_a_pku_row_becomes_one_example_per_answer_with_its_human_labels() -> None:
    safe, unsafe = from_pku(pku_row())
    assert (safe.unsafe, safe.severity, safe.categories) == (False, 0, [])
    assert (unsafe.unsafe, unsafe.severity) == (True, 2)
    assert unsafe.categories == ["Disrupting Public Order"]
    assert unsafe.origin["severity"] == "human"
    assert unsafe.source == "pku/Alpaca2-7B"


def test_an_unsafe_answer_without_severity_is_masked_not_guessed() -> None:
    _, unsafe = from_pku(pku_row(response_1_severity_level=None, response_1_harm_category=None))
    severity, mask, _, category_mask = targets(unsafe)
    assert unsafe.severity is None
    assert severity.tolist() == [1, 0, 0]
    assert mask.tolist() == [1, 0, 0]
    assert category_mask.sum() == 0


def test_a_category_that_the_taxonomy_lacks_is_named() -> None:
    row = pku_row(response_1_harm_category={"Littering": True})
    with pytest.raises(SystemExit, match="Littering"):
        list(from_pku(row))


def test_pku_is_loaded_by_name_through_datasets(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps(pku_row(prompt=f"Question number {n}?")) + "\n" for n in range(5))
    )
    examples = load_pku(str(tmp_path))
    assert len(examples) == 10
    assert sum(e.unsafe is True for e in examples) == 5


def test_build_from_pku_writes_every_split_and_a_card(tmp_path: Path) -> None:
    source, out = tmp_path / "pku", tmp_path / "out"
    source.mkdir()
    rows = [pku_row(prompt=f"{w} thing about subject {n}?") for n in range(60) for w in "abcdefgh"]
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(str(source), out)
    written = read_examples(out, *SPLITS)
    assert len(written) == 2 * len({normalise(r["prompt"]) for r in rows})
    assert "Disrupting Public Order" in (out / "card.md").read_text()


@given(st.integers(0, 400), st.integers(1, 255))
def test_a_damaged_archive_is_named_and_no_traceback(place: int, flip: int) -> None:
    whole = gzip.compress(b'{"prompt": "How do I bake a cake?"}\n' * 400, mtime=0)
    damaged = bytearray(whole)
    damaged[place % len(whole)] ^= flip
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl.gz"
        path.write_bytes(damaged)
        with suppress(SystemExit):  # of some bytes nothing hangs: the time, the system
            list(read_jsonl(path))


def test_severity_targets_are_cumulative() -> None:
    example = Example("p", "r", "s", unsafe=True, severity=2, categories=["Violence"])
    severity, mask, categories, category_mask = targets(example)
    assert severity.tolist() == [1, 1, 0]
    assert mask.tolist() == [1, 1, 1]
    assert categories.sum() == 1
    assert category_mask.sum() == 19


def test_a_harmless_text_is_known_to_be_in_no_category() -> None:
    _, mask, categories, category_mask = targets(Example("p", "r", "s", unsafe=False))
    assert mask.tolist() == [1, 1, 1]
    assert categories.sum() == 0
    assert category_mask.sum() == 19


def test_an_unlabelled_text_teaches_nothing() -> None:
    _, mask, _, category_mask = targets(Example("p", "r", "s"))
    assert mask.sum() == 0
    assert category_mask.sum() == 0


def test_the_first_of_two_equal_texts_stays() -> None:
    kept = deduplicate([Example("Why?", "So.", "good"), Example("why", "so", "worse")])
    assert [e.source for e in kept] == ["good"]


def test_an_empty_answer_is_not_the_prompt_alone() -> None:
    assert len(deduplicate([Example("Why?", "", "a"), Example("Why?", None, "b")])) == 2


def test_of_near_duplicates_the_first_stays_unless_their_labels_differ() -> None:
    answer = "mix the flour and the sugar with two eggs and some salt then bake it for an hour"
    rows = [
        Example("How do I bake a cake?", answer, "first", False, 0),
        Example("how do I bake a cake", answer + " please", "near", False, 0),
        Example("How do I bake a cake?", answer + " hatefully", "other label", True, 2),
        Example("How do I bake a cake?", "with love", "other answer", False, 0),
        Example("Quite another question", answer, "other prompt", False, 0),
        Example("How do I bake a cake?", None, "alone", False, 0),
    ]
    kept = without_near_duplicates(rows, prompt_groups(rows))
    assert [e.source for e in kept] == [
        "first", "other label", "other answer", "other prompt", "alone",
    ]  # fmt: skip


def test_the_card_says_who_gave_each_label_whether_splits_leak_and_which_traps_there_are() -> None:
    rows = [
        Example("a b", "I'm sorry, but that is illegal.", "responses/x", False,
                origin={"unsafe": "human"}),
        Example("a b", "Take a knife. Please note that it is illegal.", "annotated/x", True, 2,
                ["Drugs"], {"severity": "ai", "categories": "ai"}),
        Example("a b", "Gladly: one and two and three.", "benign/x", False, 0, [],
                {"severity": "derived", "categories": "derived"}),
        Example("kill a process", None, "over_refusal/x", False, 0, [],
                {"severity": "human", "categories": "derived"}),
        Example("c d", None, "prompts/x", True, 3, None, {"severity": "weak"}),
        Example("a b", "none", "unlabelled/x", split="test"),
    ]  # fmt: skip
    card = report(rows, {"exact": 7, "near": 3})
    assert "7 exact duplicates" in card
    assert "3 near ones" in card
    assert "| responses/x | output | 1 | 0 | 0 | 0 | human | - | - |" in card
    assert "| annotated/x | output | 1 | 0 | 0 | 1 | ai | ai | ai |" in card
    assert "| label | ai | derived | human | none | weak |" in card
    assert "| unsafe | 1 | 1 | 2 | 1 | 1 |" in card
    assert "Prompts in two splits: 1; groups of like prompts in two: 1" in card
    assert "1 harmless answers have no word of refusal or warning, 1 have one; 1 of 1" in card
    assert "1 prompts of over-refusal sets" in card
    assert "1 prompts carry weak tags" in card
    assert "Drugs (1)" in card


words = st.sampled_from([f"w{n}" for n in range(12)])


@given(st.lists(st.lists(words, min_size=1, max_size=9).map(" ".join), max_size=25))
def test_near_duplicates_are_exactly_those_of_a_brute_force_search(texts: list[str]) -> None:
    groups = near_duplicate_groups(texts)
    sets = [set(text.split()) for text in texts]
    parent = list(range(len(texts)))
    for _ in texts:  # transitive closure by repeated relaxation
        for i, a in enumerate(sets):
            for j, b in enumerate(sets):
                if len(a & b) >= 0.8 * len(a | b):
                    low = min(parent[i], parent[j])
                    parent[i] = parent[j] = low
    for i in range(len(texts)):
        for j in range(len(texts)):
            assert (groups[i] == groups[j]) == (parent[i] == parent[j])


@given(st.lists(st.tuples(words, words, words).map(" ".join), min_size=1, max_size=60))
def test_no_prompt_is_in_two_splits(prompts: list[str]) -> None:
    examples = [Example(p, f"answer {n}", "s") for n, p in enumerate(prompts)]
    split_of: dict[str, str] = {}
    for example in assign_splits(examples):
        key = normalise(example.prompt)
        assert split_of.setdefault(key, example.split) == example.split


def test_splits_do_not_depend_on_the_order_of_the_rows() -> None:
    examples = [Example(f"question {n} about {n * 7}", "r", "s") for n in range(200)]
    forward = {e.prompt: e.split for e in assign_splits(examples)}
    backward = {e.prompt: e.split for e in assign_splits(examples[::-1])}
    assert forward == backward
    assert set(forward.values()) == set(SPLITS)


def test_the_local_folder_is_read_through_one_schema(tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "annotated_responses": {
            "prompt": "p1", "response": "r", "severity": 2, "categories": ["Violence"],
            "label_source": "ai", "source": "x",
        },
        "annotated_prompts": {
            "prompt": "p2", "severity": 0, "categories": [], "label_source": "ai", "source": "x",
        },
        "over_refusal_prompts": {"prompt": "p3", "category": "c", "source": "oktest"},
        "benign": {"prompt": "p4", "response": "r", "source": "dolly"},
        "prompts": {
            "prompt": "p5", "source": "x", "categories19": ["Drugs"],
            "pku_severity_tags": ["minor", "severe"],
        },
        "responses": {
            "prompt": "p6", "response": "r", "safe": False, "label_source": "human", "source": "x",
        },
        "jailbreak_responses": {"prompt": "p7", "response": "r", "source": "x"},
        "red_team_prompts": {"prompt": "p8", "source": "x"},
    }  # fmt: skip
    assert {s.file for s in LOCAL_SOURCES} == set(rows)
    for name, row in rows.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.write(json.dumps(row) + "\n")
    out = tmp_path / "out"
    build(str(tmp_path), out)
    by_prompt = {(e.prompt, e.response): e for e in read_examples(out, *SPLITS)}
    assert len(by_prompt) == 9  # the benign row is there as an answer and as a prompt
    assert by_prompt["p1", "r"].severity == 2
    assert by_prompt["p4", None].unsafe is False
    assert by_prompt["p5", None].severity == 3
    assert by_prompt["p6", "r"].severity is None
    assert by_prompt["p7", "r"].unsafe is None
    assert "| annotated/x | output |" in report(list(by_prompt.values()))


def test_everything_adds_to_training_alone_and_moves_no_split(tmp_path: Path) -> None:
    def jailbreak(n: int, answer: int) -> Example:
        return Example(f"w{n} x{n} y{n}", f"answer {answer} to it", "unlabelled/x")

    examples = assign_splits([jailbreak(n, 0) for n in range(60)])
    rows = [
        {"prompt": f"w{n} x{n} y{n}", "response": f"answer {answer} to it", "source": "x"}
        for n in range(80)
        for answer in (0, 1)
    ]
    with gzip.open(tmp_path / "jailbreak_responses.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    rest = the_rest(tmp_path, examples)
    assert {e.split for e in rest} == {"train"}
    held = {e.prompt for e in examples if e.split != "train"}
    assert held
    assert not {e.prompt for e in rest} & held
    keys = {e.key for e in examples}
    expected = [
        e for e in (jailbreak(n, a) for n in range(80) for a in (0, 1)) if e.key not in keys
    ]
    assert {e.key for e in rest} == {e.key for e in expected if e.prompt not in held}


def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": \n')
    with pytest.raises(SystemExit, match=r"train\.jsonl:1: not JSON"):
        read_examples(tmp_path, "train")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "p"}, "unexpected keyword argument 'text'"),
        ({"prompt": "p", "response": None}, "missing 1 required positional argument: 'source'"),
        ({"prompt": "p", "response": "r", "source": "s", "severity": 9}, "severity is 9, not 0 to"),
        ({"prompt": "p", "response": 1, "source": "s"}, "its prompt or response is no text"),
        ({"prompt": "p", "response": "r", "source": "s", "categories": ["x"]}, "which none is"),
    ],
)
def test_a_row_that_is_no_example_is_named_by_file_and_number(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    fine = {"prompt": "p", "response": "r", "source": "s", "severity": 3}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(fine)}\n{json.dumps(row)}\n")
    with pytest.raises(SystemExit, match=rf"train\.jsonl:2: .*{said}.*: mend or remove this row"):
        read_examples(tmp_path, "train")


def test_a_source_that_is_no_data_is_told_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    for source in ("empty", "file", "none/at/all"):
        with pytest.raises(SystemExit, match="neither a folder of the labelled data nor a data se"):
            build(str(tmp_path / source), tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.jsonl").write_text('{"text": "p"}\n')
    with pytest.raises(SystemExit, match=r"other:1: no 'is_response_0_safe': mend or remove"):
        build(str(other), tmp_path / "out")


def test_targets_are_float32_for_torch() -> None:
    assert all(part.dtype == np.float32 for part in targets(Example("p", "r", "s", unsafe=True)))
