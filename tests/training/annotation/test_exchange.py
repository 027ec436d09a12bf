"""Round trips lose nothing, in every form and file; what is malformed is named with its line."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail.taxonomy import Category
from training.annotation.exchange import export_path, import_path, read_rows
from training.annotation.forms import BEAVERTAILS, FORMS, detect, read_record, write_row
from training.annotation.labels import AnnotationError, PairLabel, Record, SafetyLabel
from training.annotation.queue import Queue
from training.annotation.report import statistics
from training.annotation.store import Store

SHARED = Path(__file__).parents[4] / "shared" / "data"
NAMES = [c.value for c in Category]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)
harms = names.map(lambda held: {name: name in held for name in NAMES})
nothing = dict.fromkeys(NAMES, False)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
more = st.dictionaries(
    st.sampled_from(["sha256", "note", "split", "meta"]),
    scalars | st.lists(scalars, max_size=2) | st.dictionaries(texts, scalars, max_size=2),
)


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


def joined(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts, more).map(lambda rows: {k: v for row in rows for k, v in row.items()})


def plain_label(prefix: str) -> st.SearchStrategy[dict[str, Any]]:
    def fields(severity: object, categories: object, safe: object = None) -> dict[str, Any]:
        row = {f"{prefix}severity": severity, f"{prefix}categories": categories}
        return row if safe is None else {**row, f"{prefix}safe": safe}

    unsafe = st.tuples(st.sampled_from([1, 2, 3, "minor", 2.0]), names | st.none())
    return st.one_of(
        st.sampled_from([{}, fields(0, []), fields("none", None), fields(0, [], safe=True)]),
        unsafe.map(lambda said: fields(*said)),
        names.map(lambda held: fields(None, held, safe=False)),
        st.just({f"{prefix}severity": None}),
    )


def pku_label(safe: str, harm: str, severity: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.just({safe: True, harm: nothing, severity: 0}),
        st.tuples(harms | names, st.sampled_from([0, 1, 2, 3, None])).map(
            lambda said: {safe: False, harm: said[0], severity: said[1]}
        ),
        st.just({safe: True}),
    )


prompt = st.fixed_dictionaries({"prompt": texts})
answer = st.fixed_dictionaries({"response": texts})
answers = st.fixed_dictionaries({"response_0": texts, "response_1": texts})
pick = st.sampled_from([0, 1])
rows = {
    "plain": joined(
        prompt, plain_label(""), st.just({}) | answer | st.just({"response": None}),
        optional(source=texts | st.none(), label_source=texts),
    ),
    "pairs": joined(
        prompt, answers, plain_label("response_0_"), plain_label("response_1_"),
        optional(
            more_helpful=pick | st.none(), less_harmful=pick | st.none(), source_0=texts,
            label_source=texts,
        ),
    ),
    "pku": joined(
        prompt, answers,
        st.fixed_dictionaries({"better_response_id": pick, "safer_response_id": pick}),
        *(
            pku_label(
                f"is_response_{n}_safe", f"response_{n}_harm_category",
                f"response_{n}_severity_level",
            )
            for n in (0, 1)
        ),
        optional(response_0_source=texts, prompt_source=texts),
    ),
    "pku-single": joined(
        prompt, answers, st.fixed_dictionaries({"better_response_id": pick | st.just(-1)})
    ),
    "pku-qa": joined(
        prompt, answer, pku_label("is_safe", "harm_category", "severity_level"),
        optional(response_source=texts),
    ),
    "beavertails": joined(
        prompt, answer,
        st.sets(st.sampled_from(sorted(BEAVERTAILS)), max_size=3).map(
            lambda held: {
                "category": {name: name in held for name in BEAVERTAILS}, "is_safe": not held
            }
        ),
    ),
}  # fmt: skip
assert set(rows) == set(FORMS)
any_row = st.sampled_from(sorted(rows)).flatmap(rows.__getitem__)


def same(left: object, right: object) -> bool:
    """Equal as files are: 1 is not true, and not-a-number is itself."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


@given(st.data(), st.sampled_from(sorted(rows)))
def test_a_row_of_every_form_is_told_and_comes_back_as_it_was(data: Any, form: Any) -> None:
    row = data.draw(rows[form])
    assert detect(row) == form
    assert same(write_row(read_record(row), form), row)


@settings(max_examples=15)
@given(st.lists(any_row, max_size=8))
def test_rows_come_out_of_a_store_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, many: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    given_, store = folder / "in.jsonl", Store(folder / "s.db", create=True)
    given_.write_text("".join(json.dumps(row) + "\n" for row in many))
    result = import_path(store, given_)
    assert (result.rows, result.problems) == (len(many), [])
    for form in {detect(row) for row in many}:
        out = folder / f"{form}.jsonl"
        export_path(store, out, form=form)
        back = [row for _, row in read_rows(out)]
        kind = FORMS[form].pair
        wanted = [row for row in many if FORMS[detect(row)].pair == kind]
        assert len(back) == len(wanted)
        mine = [n for n, row in enumerate(wanted) if detect(row) == form]
        assert all(same(back[n], wanted[n]) for n in mine)


@given(rows["pku-qa"])
def test_the_label_survives_the_way_through_another_form(row: dict[str, Any]) -> None:
    record = read_record(row)
    again = read_record(write_row(record, "plain"), "plain")
    assert (again.prompt, again.responses, again.safety) == (
        record.prompt, record.responses, record.safety
    )  # fmt: skip


PAIR = {
    "prompt": "Why?", "response_0": "a", "response_1": "b",
    "is_response_0_safe": True, "is_response_1_safe": False,
    "response_0_harm_category": nothing, "response_1_harm_category": {**nothing, "Drugs": True},
    "response_0_severity_level": 0, "response_1_severity_level": 2,
    "better_response_id": 1, "safer_response_id": 0, "prompt_source": "x",
    "response_0_source": "Alpaca-7B", "response_1_source": "Alpaca2-7B",
    "response_0_sha256": "0" * 64, "response_1_sha256": "1" * 64,
}  # fmt: skip


def test_a_pku_pair_is_two_stage_1_labels_and_a_dual_preference() -> None:
    record = read_record(PAIR)
    assert record.safety == (SafetyLabel(True), SafetyLabel(False, 2, ("Drugs",)))
    assert record.preference == PairLabel(more_helpful=1, less_harmful=0)
    assert record.sources == ("Alpaca-7B", "Alpaca2-7B")


def test_beavertails_maps_what_is_clear_and_leaves_the_rest_unknown() -> None:
    def label(*held: str) -> SafetyLabel | None:
        category = {name: name in held for name in BEAVERTAILS}
        row = {"prompt": "p", "response": "r", "category": category, "is_safe": not held}
        return read_record(row).safety[0]

    assert len(BEAVERTAILS) == 14
    assert label() == SafetyLabel(True)
    assert label("animal_abuse") == SafetyLabel(False, None, ("Animal Abuse",))
    assert label("terrorism,organized_crime", "animal_abuse") == SafetyLabel(False, None, None)


def test_every_category_has_a_place_in_beavertails() -> None:
    for name in NAMES:
        record = Record("p", ("r",), (SafetyLabel(False, 1, (name,)),), sources=(None,))
        assert sum(write_row(record, "beavertails")["category"].values()) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ""])
def test_files_and_dataset_folders_round_trip(tmp_path: Path, suffix: str) -> None:
    given_ = tmp_path / "in.jsonl"
    many = [{**PAIR, "prompt": f"Why {n}? \U0001f98a\u0000\n"} for n in range(5)]
    given_.write_text("".join(json.dumps(row) + "\n" for row in many))
    first = Store(tmp_path / "1.db", create=True)
    import_path(first, given_)
    out = tmp_path / f"out{suffix}"
    assert export_path(first, out, form="pku").rows == 5
    second = Store(tmp_path / "2.db", create=True)
    assert import_path(second, out).rows == 5
    export_path(second, tmp_path / "back.jsonl", form="pku")
    assert [row for _, row in read_rows(tmp_path / "back.jsonl")] == many


def test_a_saved_dataset_with_splits_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list([PAIR])
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(tmp_path / "ds"))
    assert [where for where, _ in read_rows(tmp_path / "ds")] == ["train:1", "test:1"]


BAD = [
    ("{", "not JSON"),
    ("[1]", "not an object"),
    ('{"response": "x"}', "prompt is missing"),
    ('{"prompt": 3}', "prompt is not a text but int"),
    ('{"prompt": "\\ud800"}', "surrogate"),
    ('{"prompt": "p", "severity": 7}', "severity is 0, 1, 2 or 3, not 7"),
    ('{"prompt": "p", "severity": "grave"}', "'grave' is not a severity"),
    ('{"prompt": "p", "severity": 0, "categories": ["Drugs"]}', "no categories, not Drugs"),
    ('{"prompt": "p", "severity": 1, "categories": ["Littering"]}', "no such category"),
    ('{"prompt": "p", "severity": 1, "categories": "Drugs"}', "is a list"),
    ('{"prompt": "p", "severity": 1, "safe": true}', "safe is True"),
    ('{"prompt": "p", "response_0": "a", "response_1": "b", "more_helpful": 2}', "0 or 1"),
    ('{"prompt": "p", "response": "r", "is_safe": 1}', "is true or false, not 1"),
    ('{"prompt": "p", "response": "r", "is_safe": true, "category": {"x": true}}', "14"),
]


def test_malformed_rows_are_listed_with_their_lines_and_the_others_taken(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [text for text, _ in BAD]
    path.write_text("\n".join(['{"prompt": "good"}', *lines, "", '{"prompt": "fine"}']) + "\n")
    result = import_path(Store(tmp_path / "s.db", create=True), path)
    assert result.rows == 2
    assert len(result.problems) == len(BAD)
    for number, (problem, (_, what)) in enumerate(zip(result.problems, BAD, strict=True), 2):
        assert problem.startswith(f"in.jsonl:{number}: ")
        assert what in problem


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    result = import_path(Store(tmp_path / "s.db", create=True), path)
    assert result.problems == ["in.jsonl:1: not UTF-8 (byte 12)"]


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "fake.parquet", "notes.txt", "missing.jsonl"])
def test_a_file_that_cannot_be_read_leaves_the_store_as_it_was(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(json.dumps({"prompt": "p" * 9999}).encode())
    if name != "missing.jsonl":
        (tmp_path / name).write_bytes(whole[:-9])
    store = Store(tmp_path / "s.db", create=True)
    with pytest.raises(AnnotationError, match=name):
        import_path(store, tmp_path / name)
    assert store.texts() == {}


def test_what_cannot_be_kept_is_listed_and_the_others_taken(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "r", "severity": 0}, {"prompt": "q", "response": "r"}]
    path = tmp_path / "rows.jsonl"
    odd = '{"prompt": "s", "response": "r", "severity": 0, "note": "\\ud800"}'
    path.write_text(f"{json.dumps(rows[0])}\n{odd}\n")
    store = Store(tmp_path / "store.db", create=True)
    result = import_path(store, path)
    assert (result.rows, result.problems) == (
        1, ["rows.jsonl:2: holds half of a character (a surrogate)"],
    )  # fmt: skip
    pyarrow = pytest.importorskip("pyarrow")
    at = [datetime(2026, 1, 2, tzinfo=UTC)]
    table = pyarrow.table({"prompt": ["t"], "response": ["r"], "severity": [1], "at": at})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "rows.parquet")
    assert import_path(store, tmp_path / "rows.parquet").rows == 1
    export_path(store, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])["at"].startswith("2026")
    table = pyarrow.table({"prompt": ["t"], "response": ["r"], "severity": [1], "key": [b"k"]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "bytes.parquet")
    assert "a value of type bytes" in import_path(store, tmp_path / "bytes.parquet").problems[0]


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "p", "severity": 0}\n' * 2000)
    store, path = Store(tmp_path / "store.db", create=True), tmp_path / "rows.jsonl.gz"
    told = set()
    for at in range(12, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            import_path(store, path)
        except AnnotationError as error:
            told.add(type(error.__cause__).__name__)
    assert "error" in told  # zlib's


def test_what_no_table_can_hold_is_told_at_export(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "severity": 0, "meta": {}}\n')
    store = Store(tmp_path / "store.db", create=True)
    import_path(store, path)
    with pytest.raises(AnnotationError, match=r"what a table cannot.*export \.jsonl"):
        export_path(store, tmp_path / "out.parquet")


def test_a_file_without_a_good_row_may_be_taken_in_read_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "response": "r", "severity": 0}\n')
    store = Store(tmp_path / "store.db", create=True)
    assert import_path(store, path, form="pku").rows == 0
    assert import_path(store, path).rows == 1


def test_people_who_agree_in_everything_are_both_taken_in(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "response": "r", "severity": 0}\n')
    store = Store(tmp_path / "store.db", create=True)
    for name in ("ann", "bob"):
        store.add_person(name)
        import_path(store, path, person=name)
    assert [label.annotator for label in store.labels()] == ["ann", "bob"]
    with pytest.raises(AnnotationError, match="was imported on"):
        import_path(store, path, person="ann")


def test_texts_that_are_here_with_labels_are_queued_where_that_is_asked(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db", create=True)
    store.add_person("ann")
    for name, said in (("a", "p"), ("b", "pq")):
        rows = [json.dumps({"prompt": text, "response": "r", "severity": 1}) for text in said]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        import_path(store, tmp_path / f"{name}.jsonl", queue_labelled=name == "b")
    queue, prompts = Queue(store), []
    while task := queue.claim("ann"):
        prompts.append(task.prompt)
        queue.save("ann", task.id, SafetyLabel(True))
    assert prompts == ["p", "q"]


def test_labels_of_several_kinds_are_not_said_to_be_a_persons(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db", create=True)
    store.add_person("ann")
    row = {
        "prompt": "p", "response_0": "a", "response_1": "b", "severity_0": 0, "severity_1": 2,
        "categories_1": ["Drugs"], "less_harmful": 0, "more_helpful": 1, "label_source": "ai",
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    import_path(store, tmp_path / "rows.jsonl", queue_labelled=True)
    queue = Queue(store)
    task = queue.claim("ann", kind="item")
    assert task is not None
    queue.save("ann", task.id, SafetyLabel(False, 1, ("Drugs",)))
    export_path(store, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["label_source"] == "mixed"


def test_a_store_can_be_looked_at_while_another_writes_to_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db", create=True)
    with store.write():
        assert Store(tmp_path / "store.db").labels() == []


def test_a_file_is_imported_once(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "p"}\n')
    store = Store(tmp_path / "s.db", create=True)
    import_path(store, path)
    with pytest.raises(AnnotationError, match="was imported on"):
        import_path(store, path)


def test_labels_given_here_replace_the_imported_ones_and_say_who_gave_them(
    tmp_path: Path,
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(PAIR) + "\n")
    store = Store(tmp_path / "s.db", create=True)
    store.add_person("ann")
    import_path(store, path, queue_labelled=True)
    queue = Queue(store)
    while task := queue.claim("ann"):
        label = SafetyLabel(False, 3, ("Violence",)) if task.kind == "item" else PairLabel(0, "tie")
        queue.save("ann", task.id, label)
    export_path(store, tmp_path / "pku.jsonl", form="pku")
    ((_, row),) = read_rows(tmp_path / "pku.jsonl")
    assert isinstance(row, dict)
    assert (row["better_response_id"], row["safer_response_id"]) == (0, -1)
    assert row["response_0_severity_level"] == 3
    assert row["annotators"] == ["ann"]
    assert row["response_0_sha256"] == "0" * 64
    export_path(store, tmp_path / "ours.jsonl")
    ((_, row),) = read_rows(tmp_path / "ours.jsonl")
    assert isinstance(row, dict)
    assert (row["less_harmful"], row["label_source"]) == (None, "human")


def test_labels_that_a_person_gave_elsewhere_count_as_given_here(tmp_path: Path) -> None:
    store, said = Store(tmp_path / "s.db", create=True), {}
    unsafe = {"severity": 2, "categories": ["Drugs"]}
    said["ann"] = [unsafe, unsafe, {"severity": 0}]
    said["cat"] = [{"safe": False}, {"severity": 0}, {"severity": 0}]  # one knows no severity
    for name, labels in said.items():
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"p{n}", "response": "r", **label} for n, label in enumerate(labels)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(AnnotationError, match=f"{name}: no such annotator"):
            import_path(store, path, person=name)
        store.add_person(name, adjudicates=name == "cat")
        assert import_path(store, path, person=name).rows == 3
    assert [(one.annotator, one.role) for one in store.labels("item", 1)] == [
        ("ann", "human"), ("cat", "human"),
    ]  # fmt: skip
    found = statistics(store.labels())
    assert found["people"]["alpha"]["safe"]["n"] == 3
    assert found["people"]["alpha"]["severity"]["n"] == 2
    assert found["people"]["alpha"]["Drugs"]["n"] == 2
    assert found["anchoring"]["n_blind"] == 0  # nobody tossed a coin there
    queue = Queue(store)
    assert queue.claim("ann") is None
    assert queue.progress("cat").disputed == 1  # what one leaves open, the other may know
    dispute = queue.claim_disputed("cat")
    assert dispute is not None
    assert dispute[0].prompt == "p1"


def test_an_export_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db", create=True)
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(AnnotationError, match="is there already"):
        export_path(store, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "precious"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the annotated data is not here")
@pytest.mark.parametrize("name", ["annotated_responses", "annotated_prompts", "annotated_pairs"])
def test_the_annotated_data_round_trips(tmp_path: Path, name: str) -> None:
    with gzip.open(SHARED / f"{name}.jsonl.gz", "rt") as file:
        wanted = [json.loads(line) for line in file][::20]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in wanted))
    store = Store(tmp_path / "s.db", create=True)
    assert import_path(store, path).problems == []
    export_path(store, tmp_path / "out.jsonl.gz")
    assert [row for _, row in read_rows(tmp_path / "out.jsonl.gz")] == wanted
