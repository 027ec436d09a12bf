"""The stream gate: nothing forbidden gets out, nothing allowed gets lost, at a linear price."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrail import (
    Action,
    Assessment,
    Category,
    Direction,
    Guard,
    Passage,
    Policy,
    Severity,
    Verdict,
)
from guardrail.stream import (
    Judge,
    Need,
    Release,
    Stop,
    StreamConfig,
    _sentences,
    mask_passages,
    stream_gate,
)
from guardrail.testing import FakeModerator, leaked_chars

ALLOW = Verdict(Action.ALLOW, Direction.OUTPUT)
REFUSE = Verdict(Action.REFUSE, Direction.OUTPUT)


@dataclass
class Run:
    """What one run of the gate did."""

    received: str = ""
    released: list[str] = field(default_factory=list)
    judged: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)  # judged, and decided as deliverable
    buffers: list[int] = field(default_factory=list)  # received minus released, at each Need
    deltas: list[int] = field(default_factory=list)
    stopped: Verdict | None = None
    verdict: Verdict | None = None

    @property
    def text(self) -> str:
        return "".join(self.released)


def run_gate(
    deltas: Iterable[str], judge: Callable[[str], Verdict], config: StreamConfig | None = None
) -> Run:
    run = Run()
    source = iter(deltas)
    gate = stream_gate(config)
    event = next(gate)
    while True:
        answer: str | Verdict | None = None
        match event:
            case Need():
                run.buffers.append(len(run.received) - len(run.text))
                answer = next(source, None)
                run.received += answer or ""
                run.deltas.append(len(answer or ""))
            case Judge(text):
                answer = judge(text)
                run.judged.append(text)
                if answer.delivers:
                    run.passed.append(text)
            case Release(text):
                assert run.stopped is None, "released after a stop"
                run.released.append(text)
            case Stop(verdict):
                run.stopped = verdict
        try:
            event = gate.send(answer)
        except StopIteration as end:
            run.verdict = end.value
            return run


def guard_for(words: Iterable[str], action: Action) -> Guard:
    policy = Policy.parse(f'name = "t"\n[output]\nmoderate = "{action}"\nsevere = "{action}"')
    return Guard(FakeModerator(dict.fromkeys(words, (Severity.SEVERE, Category.VIOLENCE))), policy)


def judge_with(guard: Guard) -> Callable[[str], Verdict]:
    return lambda text: guard.check(response=text)


configs = st.builds(
    lambda first, extra, growth, context: StreamConfig(first, growth, first + extra, context),
    first=st.integers(1, 40),
    extra=st.integers(0, 60),
    growth=st.floats(1, 3),
    context=st.integers(12, 80),
)
# Letters that do not stand in the mask, so that a mask is never taken for a forbidden word.
words = st.sets(st.text("xyz ", min_size=2, max_size=8).filter(str.strip), min_size=1, max_size=3)


@st.composite
def chunked(draw: st.DrawFn, text: str) -> list[str]:
    """`text` in deltas of any size: empty ones, single characters, all at once."""
    size = draw(st.sampled_from([1, 3, 17, 10_000]))
    deltas = []
    while text:
        n = draw(st.integers(0, size)) if size > 1 else 1
        deltas.append(text[:n])
        text = text[n:]
        if len(deltas) > 400:
            deltas.append(text)
            break
    return deltas


@st.composite
def streams(draw: st.DrawFn) -> tuple[set[str], list[str]]:
    forbidden = draw(words)
    filler = st.text("xyz  .\n", max_size=30)
    parts = draw(st.lists(st.one_of(st.sampled_from(sorted(forbidden)), filler), max_size=12))
    return forbidden, draw(chunked("".join(parts)))


@given(
    stream=streams(),
    config=configs,
    action=st.sampled_from([Action.REDACT, Action.REGENERATE, Action.REFUSE]),
)
def test_no_forbidden_word_leaks_under_any_chunking(
    stream: tuple[set[str], list[str]], config: StreamConfig, action: Action
) -> None:
    forbidden, deltas = stream
    run = run_gate(deltas, judge_with(guard_for(forbidden, action)), config)
    assert leaked_chars(run.released, forbidden) == 0


@given(stream=streams(), config=configs, action=st.sampled_from([Action.REFUSE, Action.FLAG]))
def test_what_goes_out_is_the_text_up_to_the_stop_and_all_of_it_without_one(
    stream: tuple[set[str], list[str]], config: StreamConfig, action: Action
) -> None:
    forbidden, deltas = stream
    run = run_gate(deltas, judge_with(guard_for(forbidden, action)), config)
    assert "".join(deltas).startswith(run.text)
    if run.stopped is None:
        assert run.text == "".join(deltas)
    assert (run.stopped is not None) == (
        action is Action.REFUSE and any(word in run.received for word in forbidden)
    )


@given(deltas=st.text(max_size=400).flatmap(chunked), config=configs, data=st.data())
def test_every_released_character_was_in_a_text_that_was_allowed(
    deltas: list[str], config: StreamConfig, data: st.DataObject
) -> None:
    refused = data.draw(st.integers(0, 30), label="judgement that is refused")
    count = iter(range(10_000))
    run = run_gate(deltas, lambda _: REFUSE if next(count) == refused else ALLOW, config)
    assert "".join(deltas).startswith(run.text)
    # One release per allowed judgement, in its order, each the end of the text it was judged in.
    passed = [text for text in run.passed if text] if run.released else []
    for piece, judged in zip(run.released, passed, strict=False):
        assert judged.endswith(piece)
    assert len(run.released) <= len(run.passed)
    assert (run.stopped is REFUSE) == (len(run.judged) > refused)


@given(deltas=st.text("ab .\n", max_size=600).flatmap(chunked), config=configs)
def test_the_buffer_stays_below_the_longest_passage_while_the_stream_runs(
    deltas: list[str], config: StreamConfig
) -> None:
    run = run_gate(deltas, lambda _: ALLOW, config)
    assert all(buffer < max(config.longest, 33) for buffer in run.buffers)  # or a long word
    assert run.text == "".join(deltas)


@given(
    length=st.integers(0, 6000),
    unit=st.sampled_from(["a", "word ", "A sentence. ", "a" * 50 + " ", "\n"]),
    size=st.sampled_from([1, 7, 100_000]),
    config=configs,
)
def test_the_cost_is_linear_in_the_length(
    length: int, unit: str, size: int, config: StreamConfig
) -> None:
    text = (unit * (length // len(unit) + 1))[:length]
    deltas = [text[i : i + size] for i in range(0, length, size)]
    run = run_gate(deltas, lambda _: ALLOW, config)
    # Two passages in a row are never both short, so there are at most 2 per half of `first`.
    passages = 4 * length / config.first + 2
    assert len(run.judged) <= passages + 1
    assert sum(map(len, run.judged)) <= 2 * length + passages * config.context


@given(
    stream=streams(),
    config=configs,
    action=st.sampled_from([Action.ALLOW, Action.FLAG, Action.REDACT, Action.REFUSE]),
)
def test_an_answer_that_was_read_to_its_end_is_decided_as_check_decides_it(
    stream: tuple[set[str], list[str]], config: StreamConfig, action: Action
) -> None:
    forbidden, deltas = stream
    guard = guard_for(forbidden, action)
    run = run_gate(deltas, judge_with(guard), config)
    assert run.verdict is not None
    assert run.verdict.action is guard.check(response="".join(deltas)).action
    if run.stopped is None:
        assert run.verdict == guard.check(response="".join(deltas))
        assert "".join(deltas) in run.judged


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_redacted_passage_is_masked_and_the_rest_goes_on(size: int) -> None:
    text = "My name is fine. Call secret now. " * 20 + "The end."
    deltas = [text[i : i + size] for i in range(0, len(text), size)]
    run = run_gate(deltas, judge_with(guard_for({"secret"}, Action.REDACT)))
    assert run.stopped is None
    assert run.text == text.replace("secret", "[redacted]")


def test_words_that_make_harm_of_what_is_out_are_withheld() -> None:
    """The passage lies in what was released, and nothing of the new text is masked."""
    text = "Ring at Ann Lee's door. She lives in Elm Road. It is green there."

    def judge(text: str) -> Verdict:
        if not ("Ann Lee" in text and "Elm Road" in text):
            return ALLOW
        start = text.index("Ann Lee")
        seen = Assessment.harmless(Direction.OUTPUT)
        seen = replace(seen, passages=(Passage(start, start + 7, 0.9),))
        return Verdict(Action.REDACT, Direction.OUTPUT, assessment=seen)

    run = run_gate(list(text), judge, StreamConfig(first=10, growth=1, longest=10))
    assert run.stopped is None
    assert "Ann Lee" in run.text
    assert "Elm Road" not in run.text
    assert run.text.endswith("It is green there.")


def test_a_redaction_that_cannot_say_where_is_a_stop() -> None:
    nowhere = Verdict(Action.REDACT, Direction.OUTPUT)
    run = run_gate(["some text"], lambda _: nowhere)
    assert run.stopped is nowhere
    assert run.text == ""


def test_a_masked_text_that_is_still_harmful_is_a_stop() -> None:
    policy = Policy.parse(
        'name = "t"\n[output]\nsevere = "refuse"\n[output.categories."Privacy Violation"]\n'
        'minor = "redact"'
    )
    moderator = FakeModerator(
        {
            "phone": (Severity.MINOR, Category.PRIVACY_VIOLATION),
            "my [redacted]": (Severity.SEVERE, Category.VIOLENCE),
        }
    )
    gathers = StreamConfig(first=80)
    run = run_gate(["call my phone"], judge_with(Guard(moderator, policy)), gathers)
    assert run.stopped is not None
    assert run.stopped.action is Action.REFUSE
    assert run.text == ""


def names(*words: str) -> Callable[[str], Verdict]:
    """Judges that find one of the words at a time, the first that is there."""

    def judge(text: str) -> Verdict:
        for word in words:
            if word in text:
                at = text.index(word)
                seen = Assessment.harmless(Direction.OUTPUT)
                seen = replace(seen, passages=(Passage(at, at + len(word), 0.9),))
                return Verdict(Action.REDACT, Direction.OUTPUT, assessment=seen)
        return ALLOW

    return judge


@pytest.mark.parametrize("size", [7, 1000])
def test_what_is_left_after_masking_is_masked_until_it_may_go_out(size: int) -> None:
    text = "Ann lives in Elm Road and Bob in Oak Lane. It is green there."
    deltas = [text[i : i + size] for i in range(0, len(text), size)]
    run = run_gate(deltas, names("Ann", "Elm Road", "Bob"), StreamConfig(first=60))
    assert run.stopped is None
    assert run.text == (
        "[redacted] lives in [redacted] and [redacted] in Oak Lane. It is green there."
    )


def test_a_text_that_masking_does_not_mend_is_a_stop() -> None:
    text = "Ann lives in Elm Road and Bob in Oak Lane."
    run = run_gate([text], names("Ann", "Elm Road", "Bob", "Oak Lane"), StreamConfig(first=60))
    assert run.stopped is not None
    assert run.stopped.action is Action.REDACT
    assert run.text == ""


def test_a_sentence_that_hides_behind_what_was_masked_is_seen() -> None:
    """Alone it is held; amid others, masked ones too, the policy's threshold is not reached."""

    def judge(text: str) -> Verdict:
        if "secret" in text:
            return names("secret")(text)
        if text.startswith("My pin is written on the back of"):
            return REFUSE
        seen = Assessment(
            direction=Direction.OUTPUT,
            severity_probabilities=dict.fromkeys(Severity, 0.0)
            | {Severity.NONE: 0.7, Severity.MINOR: 0.3},
            categories=dict.fromkeys(Category, 0.0),
        )
        return replace(ALLOW, assessment=seen)

    text = "The word that nobody may read is secret. My pin is written on the back of the card."
    run = run_gate([text], judge, StreamConfig().gathered())
    assert run.stopped is not None
    assert run.text == ""


def test_a_redaction_without_an_assessment_lets_nothing_out() -> None:
    """Of a failure, under `on_error = "redact"`: the masked text was judged by nobody."""
    failed = Verdict(Action.REDACT, Direction.OUTPUT, degraded=True, error="gone")
    run = run_gate(
        ["Ann is here."], lambda text: failed if "[redacted]" in text else names("Ann")(text)
    )
    assert run.stopped is failed
    assert run.text == ""


def test_masks_keep_their_distance_from_what_follows() -> None:
    text = "Ann is here. Bob is not."
    assert mask_passages(text, [Passage(0, 13, 0.9)], "[redacted]") == "[redacted] Bob is not."


def test_a_word_is_not_cut_in_two_when_it_has_an_end() -> None:
    text = "alpha beta gamma delta epsilon " * 30
    run = run_gate(text, lambda _: ALLOW, StreamConfig(first=20, longest=50))
    assert len(run.released) > 10
    assert all(piece.endswith(" ") for piece in run.released)


def test_passages_end_with_a_sentence_where_one_ends() -> None:
    run = run_gate("One two three four. Five six. Sev", lambda _: ALLOW, StreamConfig(first=30))
    assert run.released == ["One two three four. Five six. ", "Sev"]


def test_text_without_white_space_still_flows() -> None:
    run = run_gate("字" * 5000, lambda _: ALLOW)
    assert len(run.released) > 5
    assert run.text == "字" * 5000


def test_a_whole_answer_at_once_is_judged_twice_at_most() -> None:
    run = run_gate(["A sentence. " * 5000], lambda _: ALLOW)
    assert len(run.judged) == 2


def test_the_first_text_comes_early_and_passages_grow() -> None:
    run = run_gate("word " * 2000, lambda _: ALLOW)
    sizes = [len(piece) for piece in run.released[:-1]]
    assert sizes[0] <= 80
    assert sizes[-1] > 500
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    "values",
    [
        {"first": 0},
        {"first": 700},
        {"growth": 0.5},
        {"context": -1},
        {"mask": ""},
        {"second_look": 1.5},
        {"first": 1.5},
        {"first": "5"},
        {"first": True},
        {"longest": 10.5},
        {"context": 3.5},
        {"context": None},
        {"growth": "2"},
        {"second_look": "0.5"},
        {"mask": 5},
        {"mask": None},
    ],
)
def test_a_config_that_cannot_work_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        StreamConfig(**values)  # type: ignore[arg-type]


def test_the_gate_says_what_it_needs_when_it_is_sent_something_else() -> None:
    gate = stream_gate()
    next(gate)
    with pytest.raises(TypeError, match="needs a delta"):
        gate.send(ALLOW)
    gate = stream_gate(StreamConfig(first=1))
    next(gate)
    gate.send("text ")
    with pytest.raises(TypeError, match="needs a verdict"):
        gate.send("text")


@given(text=st.text(max_size=60), data=st.data())
def test_masking_keeps_everything_outside_the_passages(text: str, data: st.DataObject) -> None:
    index = st.integers(0, len(text))
    spans = data.draw(st.lists(st.tuples(index, index).map(sorted), max_size=4))
    skip = data.draw(index)
    passages = [Passage(start, end, 1.0) for start, end in spans]
    covered = {i for start, end in spans for i in range(start, end)}
    out = mask_passages(text, passages, "\0", skip=skip)
    kept = "".join(c for i, c in enumerate(text) if i >= skip and i not in covered)
    # White space between two neighbouring passages goes with them.
    assert "".join(out.replace("\0", "").split()) == "".join(kept.replace("\0", "").split())


def test_leaked_chars_counts_whole_strings_only() -> None:
    assert leaked_chars(["a bo", "mb and a bomb"], {"bomb"}) == 8
    assert leaked_chars("a bom", {"bomb"}) == 0
    assert leaked_chars("", {"bomb"}) == 0


# --- the second look -----------------------------------------------------------------------------

PLAIN = "The gulls sat in rows on the old railing. "
HARM = "Then you light the fuse of the pipe and run off. "


def diluting(text: str, action: Action = Action.REFUSE) -> Verdict:
    """As a model that sees a harmful sentence alone, and amid harmless ones only a trace of it."""
    at = text.find(HARM.strip())
    alone = at >= 0 and len(text) < 2 * len(HARM)
    trace = 1.0 if alone else 0.3 * (at >= 0)
    seen = Assessment(
        direction=Direction.OUTPUT,
        severity_probabilities=dict.fromkeys(Severity, 0.0)
        | {Severity.NONE: 1 - trace, Severity.MODERATE: trace},
        categories=dict.fromkeys(Category, 0.0),
        passages=(Passage(at, at + len(HARM.strip()), 1.0),) if alone else (),
    )
    return Verdict(action if alone else Action.ALLOW, Direction.OUTPUT, assessment=seen)


@pytest.mark.parametrize("size", [1, 13, 10_000])
@pytest.mark.parametrize("place", [0, 3, 11, 12])
def test_a_harmful_sentence_amid_harmless_ones_is_seen_at_the_second_look(
    size: int, place: int
) -> None:
    text = "".join(HARM if n == place else PLAIN for n in range(13)).strip()
    deltas = [text[i : i + size] for i in range(0, len(text), size)]
    # Passages of several sentences: the first look does not see it.
    gathers = StreamConfig(first=300)
    run = run_gate(deltas, diluting, gathers)
    assert run.stopped is not None
    assert leaked_chars(run.released, [HARM.strip()]) == 0
    blind = run_gate(deltas, diluting, StreamConfig(first=300, second_look=1))
    assert blind.text == text


@pytest.mark.parametrize("size", [1, 13, 10_000])
def test_what_the_second_look_redacts_is_masked_where_it_stands(size: int) -> None:
    text = (PLAIN * 9 + HARM + PLAIN * 9 + HARM + PLAIN).strip()
    deltas = [text[i : i + size] for i in range(0, len(text), size)]
    run = run_gate(deltas, lambda t: diluting(t, Action.REDACT), StreamConfig(first=200))
    assert run.stopped is None
    assert run.text == text.replace(HARM.strip(), "[redacted]")


def test_a_clearly_harmless_text_is_not_looked_at_again() -> None:
    looked = run_gate([PLAIN * 40], diluting)
    assert looked.judged == run_gate([PLAIN * 40], diluting, StreamConfig(second_look=1)).judged
    assert len(run_gate([PLAIN * 40], diluting, StreamConfig(second_look=0)).judged) > 40


# --- what cannot be read -------------------------------------------------------------------------

FOREIGN = "ΑΒΓΔ ΕΖΗΘ ΙΚΛΜ. "


def reading(text: str) -> Verdict:
    """As a policy that refuses what is foreign by more than 30 %, with a trace of harm in all."""
    strange = text.count("Α") * len(FOREIGN) > 0.3 * len(text)
    trace = replace(Assessment.harmless(Direction.OUTPUT), unreadable=strange)
    levels = {**trace.severity_probabilities, Severity.NONE: 0.7, Severity.MINOR: 0.3}
    seen = replace(trace, severity_probabilities=levels)
    return Verdict(Action.REFUSE if strange else Action.ALLOW, Direction.OUTPUT, assessment=seen)


@pytest.mark.parametrize("size", [1, 13, 10_000])
@pytest.mark.parametrize("before", [0, 1, 40])
def test_a_foreign_quote_does_not_stop_an_answer_that_can_be_read(size: int, before: int) -> None:
    text = PLAIN * before + FOREIGN * 30 + PLAIN * 60
    deltas = [text[i : i + size] for i in range(0, len(text), size)]
    run = run_gate(deltas, reading)
    assert run.text == text
    assert all(piece in "".join(run.passed) for piece in run.released)
    assert max(run.buffers) <= 4 * 600 + size


@pytest.mark.parametrize("size", [1, 13, 10_000])
@pytest.mark.parametrize("growth", [1, 2.5])
def test_an_answer_that_cannot_be_read_is_stopped_soon_and_nothing_of_it_goes_out(
    size: int, growth: float
) -> None:
    text = FOREIGN * 2000
    deltas = [text[i : i + size] for i in range(0, len(text), size)]
    run = run_gate(deltas, reading, StreamConfig(growth=growth))
    assert run.text == ""
    assert run.stopped is not None
    assert len(run.received) <= 4 * 600 + 2 * size
    assert sum(map(len, run.judged)) <= 4 * len(run.received)


def test_harm_in_what_cannot_be_read_is_a_stop_at_once() -> None:
    moderator = FakeModerator({"gulls": (Severity.SEVERE, Category.VIOLENCE)})
    held = Guard(moderator, "strict").check(response=PLAIN)
    assert held.reasons
    assert held.assessment is not None
    held = replace(held, assessment=replace(held.assessment, unreadable=True))
    run = run_gate(list(PLAIN), lambda _: held)
    assert run.stopped is held
    assert len(run.received) < 10


@given(text=st.text("ab. \n1", max_size=400))
def test_sentences_are_the_text_in_order_and_none_is_only_a_number(text: str) -> None:
    spans = _sentences(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(end - start >= min(40, len(text)) for start, end in spans)


@given(length=st.integers(0, 6000), unit=st.sampled_from(["a", "Word. ", "\n", PLAIN]))
def test_even_where_everything_is_looked_at_twice_the_cost_is_linear(
    length: int, unit: str
) -> None:
    text = (unit * (length // len(unit) + 1))[:length]
    run = run_gate([text], diluting, StreamConfig(second_look=0))
    assert sum(map(len, run.judged)) <= 4 * length + 350
