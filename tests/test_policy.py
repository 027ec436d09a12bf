from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrail.artifact import artifact_folder, read_manifest
from guardrail.errors import PolicyError
from guardrail.policy import LEVELS, PRESETS, Policy, Rules, Thresholds
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Action, Assessment

OUTPUT = Direction.OUTPUT
ACTIONS = st.sampled_from(Action)
PROBABILITIES = st.floats(0, 1)
ROWS = st.dictionaries(st.sampled_from(LEVELS), ACTIONS)
RISING = st.lists(ACTIONS, min_size=3, max_size=3).map(
    lambda actions: dict(zip(LEVELS, sorted(actions), strict=True))
)
LEVEL_THRESHOLDS = st.dictionaries(st.sampled_from(LEVELS), PROBABILITIES)
CATEGORY = st.sampled_from(Category)
THRESHOLDS = st.builds(Thresholds, LEVEL_THRESHOLDS, st.dictionaries(CATEGORY, PROBABILITIES))
CUMULATIVE = st.lists(PROBABILITIES, min_size=3, max_size=3).map(lambda p: sorted(p, reverse=True))
CATEGORIES = st.lists(PROBABILITIES, min_size=19, max_size=19)


def seen(
    minor: float = 0.0,
    moderate: float = 0.0,
    severe: float = 0.0,
    categories: dict[Category, float] | None = None,
    *,
    direction: Direction = OUTPUT,
    unreadable: bool = False,
) -> Assessment:
    """An assessment from P(severity >= minor, moderate, severe)."""
    edges = [1.0, minor, moderate, severe, 0.0]
    return Assessment(
        direction,
        {s: edges[s] - edges[s + 1] for s in Severity},
        {**dict.fromkeys(Category, 0.0), **(categories or {})},
        unreadable=unreadable,
    )


def policies(rows: st.SearchStrategy[dict[Severity, Action]]) -> st.SearchStrategy[Policy]:
    rules = st.builds(
        Rules,
        rows,
        st.dictionaries(CATEGORY, rows),
        THRESHOLDS,
        st.dictionaries(CATEGORY, LEVEL_THRESHOLDS),
    )
    return st.builds(Policy, st.just("p"), input=rules, output=rules, unreadable=ACTIONS)


@st.composite
def assessments(draw: st.DrawFn) -> Assessment:
    return seen(
        *draw(CUMULATIVE),
        dict(zip(Category, draw(CATEGORIES), strict=True)),
        direction=draw(st.sampled_from(Direction)),
        unreadable=draw(st.booleans()),
    )


# --- decisions -----------------------------------------------------------------------------------


@given(policies(ROWS), assessments(), THRESHOLDS)
def test_the_strongest_action_wins(policy: Policy, text: Assessment, model: Thresholds) -> None:
    verdict = policy.decide(text, model)
    rules = policy.rules(text.direction)
    costs = [rules.action(r.category, r.severity) for r in verdict.reasons]
    costs += [policy.unreadable] if text.unreadable else []
    assert verdict.action is max(costs, default=Action.ALLOW)
    assert verdict.severity is max((r.severity for r in verdict.reasons), default=Severity.NONE)
    assert list(verdict.reasons) == sorted(
        verdict.reasons, key=lambda r: (r.severity, r.probability), reverse=True
    )
    assert verdict.assessment is text
    assert not verdict.degraded


@given(policies(ROWS), assessments(), THRESHOLDS)
def test_deciding_is_pure(policy: Policy, text: Assessment, model: Thresholds) -> None:
    before = copy.deepcopy((policy, text, model))
    assert policy.decide(text, model) == policy.decide(text, model)
    assert (policy, text, model) == before


@given(policies(ROWS), assessments(), THRESHOLDS)
def test_each_reason_reached_what_it_is_held_for(
    policy: Policy, text: Assessment, model: Thresholds
) -> None:
    rules = policy.rules(text.direction)
    thresholds = model | rules.thresholds
    for reason in policy.decide(text, model).reasons:
        own = rules.category_severity.get(reason.category, {})
        levels = {**thresholds.severity, **own}
        assert reason.probability == text.categories[reason.category] >= reason.threshold
        for level in LEVELS[: LEVELS.index(reason.severity) + 1]:
            assert text.at_least(level) >= levels.get(level, 0.5)


@given(policies(RISING), assessments(), THRESHOLDS, CUMULATIVE)
def test_a_graver_text_never_gets_a_weaker_action(
    policy: Policy, text: Assessment, model: Thresholds, other: list[float]
) -> None:
    raised = [max(text.at_least(level), p) for level, p in zip(LEVELS, other, strict=True)]
    graver = seen(
        *raised, dict(text.categories), direction=text.direction, unreadable=text.unreadable
    )
    # P(>= level) is a sum of differences: equal but for the last bit
    for level in LEVELS:
        if graver.at_least(level) < text.at_least(level):
            return
    before, after = policy.decide(text, model), policy.decide(graver, model)
    assert after.action >= before.action
    assert after.severity >= before.severity


@given(RISING, THRESHOLDS, assessments(), CATEGORIES)
def test_a_surer_category_never_gets_a_weaker_action_where_all_cost_the_same(
    row: dict[Severity, Action], model: Thresholds, text: Assessment, other: list[float]
) -> None:
    raised = {c: max(p, q) for (c, p), q in zip(text.categories.items(), other, strict=True)}
    surer = Assessment(text.direction, text.severity_probabilities, raised)
    policy = Policy("p", input=Rules(row), output=Rules(row), unreadable=Action.ALLOW)
    assert policy.decide(surer, model).action >= policy.decide(text, model).action


@pytest.mark.parametrize(
    ("text", "action", "severity", "categories"),
    [
        (seen(0.4, 0.3, 0.2, {Category.VIOLENCE: 0.9}), "allow", "none", []),
        (seen(0.6, 0.3, 0.2, {Category.VIOLENCE: 0.9}), "flag", "minor", ["Violence"]),
        (seen(0.9, 0.6, 0.2, {Category.VIOLENCE: 0.9}), "refuse", "moderate", ["Violence"]),
        (seen(0.9, 0.8, 0.7, {Category.VIOLENCE: 0.9}), "refuse", "severe", ["Violence"]),
        (seen(0.9, 0.8, 0.1, {Category.PRIVACY_VIOLATION: 0.9}), "redact", "moderate",
         ["Privacy Violation"]),
        (seen(0.9, 0.8, 0.1, {Category.PRIVACY_VIOLATION: 0.9, Category.CYBERCRIME: 0.7}),
         "refuse", "moderate", ["Privacy Violation", "Cybercrime"]),
        # no category is sure: the most probable one stands in
        (seen(0.9, 0.8, 0.1, {Category.DRUGS: 0.3, Category.VIOLENCE: 0.2}), "refuse", "moderate",
         ["Drugs"]),
        (seen(unreadable=True), "flag", "none", []),
        (seen(0.9, 0.8, 0.7, {Category.VIOLENCE: 0.9}, unreadable=True), "refuse", "severe",
         ["Violence"]),
    ],
)  # fmt: skip
def test_balanced_decides(
    text: Assessment, action: str, severity: str, categories: list[str]
) -> None:
    verdict = Policy.load("balanced").decide(text)
    assert (verdict.action.value, verdict.severity.label) == (action, severity)
    assert [reason.category.value for reason in verdict.reasons] == categories
    assert verdict.policy == "balanced@1"


def test_a_low_threshold_for_self_harm_holds_what_the_global_one_lets_pass() -> None:
    policy = Policy.parse(
        """
        name = "helpline"
        extends = "balanced"
        [output.categories."Psychological Harm"]
        minor = "refuse"
        threshold = 0.2
        thresholds = { minor = 0.3 }
        """
    )
    text = seen(0.35, 0.1, 0.0, {Category.PSYCHOLOGICAL_HARM: 0.25})
    assert Policy.load("balanced").decide(text).action is Action.ALLOW
    verdict = policy.decide(text, Thresholds({Severity.MINOR: 0.6}))
    assert (verdict.action, verdict.severity) == (Action.REFUSE, Severity.MINOR)
    assert [(r.category, r.threshold) for r in verdict.reasons] == [
        (Category.PSYCHOLOGICAL_HARM, 0.2)
    ]
    other = seen(0.35, 0.1, 0.0, {Category.VIOLENCE: 0.9})
    assert policy.decide(other).action is Action.ALLOW


def test_a_high_threshold_for_one_category_is_not_undone_by_the_text_as_a_whole() -> None:
    policy = Policy.parse(
        'name = "bar"\nextends = "balanced"\n[output.categories.Drugs.thresholds]\nminor = 0.9'
    )
    assert policy.decide(seen(0.7, 0.6, 0.0, {Category.DRUGS: 0.8})).action is Action.ALLOW
    assert policy.decide(seen(0.7, 0.6, 0.0, {Category.VIOLENCE: 0.8})).action is Action.REFUSE
    assert policy.decide(seen(0.95, 0.6, 0.0, {Category.DRUGS: 0.8})).action is Action.REFUSE


def test_a_policys_thresholds_override_the_models() -> None:
    model = Thresholds({Severity.MINOR: 0.9}, {Category.DRUGS: 0.9})
    text = seen(0.5, 0.5, 0.0, {Category.DRUGS: 0.5})
    assert Policy.load("balanced").decide(text, model).action is Action.ALLOW
    assert Policy.load("strict").decide(text, model).action is Action.REFUSE


def test_directions_have_rules_of_their_own() -> None:
    policy = Policy.parse('name = "t"\n[input]\nminor = "refuse"\n[output]\nminor = "flag"')
    harm = {Category.VIOLENCE: 0.9}
    assert policy.decide(seen(0.9, categories=harm, direction=Direction.INPUT)).action == "refuse"
    assert policy.decide(seen(0.9, categories=harm)).action == "flag"


def test_failing_takes_the_policys_on_error_action() -> None:
    verdict = Policy.load("balanced").fail(OUTPUT, "gone")
    assert (verdict.action, verdict.degraded, verdict.error) == (Action.REFUSE, True, "gone")
    assert verdict.assessment is None
    assert Policy.load("audit-only").fail(OUTPUT, "gone").action is Action.ALLOW
    assert Policy("bare").on_error is Action.REFUSE


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_threshold_is_a_probability(value: float) -> None:
    with pytest.raises(ValueError, match="probability between 0 and 1"):
        Thresholds({Severity.MINOR: value})


# --- presets and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_file_says(name: str) -> None:
    text = resources.files("guardrail").joinpath(f"policies/{name}.toml").read_text()
    policy = Policy.load(name)
    assert policy == Policy.parse(text)
    assert (policy.name, policy.id) == (name, f"{name}@1")
    assert policy.description
    for rules in (policy.input, policy.output):
        assert set(rules.actions) == set(LEVELS)
        for row in ({}, *rules.categories.values()):
            costs = [{**rules.actions, **row}[level] for level in LEVELS]
            assert costs == sorted(costs), "a graver harm costs less"


def test_presets_from_strict_to_audit_only_get_weaker() -> None:
    loaded = [Policy.load(name) for name in PRESETS]
    for direction in Direction:
        for level in LEVELS:
            for category in set(Category) - {Category.PRIVACY_VIOLATION}:
                costs = [p.rules(direction).action(category, level) for p in loaded[:3]]
                assert costs == sorted(costs, reverse=True)
    assert all(p.on_error is Action.REFUSE for p in loaded[:3])
    everything = dict.fromkeys(Category, 1.0)
    assert loaded[3].decide(seen(1, 1, 1, everything, unreadable=True)).delivers


def test_strict_holds_nothing_later_than_the_bundled_model_would() -> None:
    manifest = read_manifest(artifact_folder())
    for direction in Direction:
        model = manifest.thresholds_of(direction)
        strict = model | Policy.load("strict").rules(direction).thresholds
        assert strict.categories == model.categories
        for level in LEVELS:
            assert strict.severity[level] <= model.severity.get(level, 0.5)


def test_a_preset_extended_by_nothing_decides_as_it_does() -> None:
    for name in PRESETS:
        preset, mine = Policy.load(name), Policy.parse(f'name = "m"\nextends = "{name}"')
        assert (mine.input, mine.output) == (preset.input, preset.output)
        assert (mine.on_error, mine.unreadable) == (preset.on_error, preset.unreadable)
        assert mine.id == "m@1"


def test_what_an_extending_policy_says_replaces_only_that() -> None:
    mine = Policy.parse(
        """
        name = "mine"
        version = 3
        extends = "strict"
        unreadable = "allow"
        [input]
        minor = "flag"
        [input.thresholds]
        severe = 0.9
        [output.categories.Violence]
        severe = "regenerate"
        """
    )
    strict = Policy.load("strict")
    assert mine.id == "mine@3"
    assert (mine.unreadable, mine.on_error) == (Action.ALLOW, strict.on_error)
    assert mine.input.actions == {**strict.input.actions, Severity.MINOR: Action.FLAG}
    assert mine.input.thresholds == strict.input.thresholds | Thresholds({Severity.SEVERE: 0.9})
    assert mine.output.actions == strict.output.actions
    assert mine.output.action(Category.VIOLENCE, Severity.SEVERE) is Action.REGENERATE
    assert mine.output.action(Category.VIOLENCE, Severity.MINOR) is Action.REFUSE
    assert Policy.load("strict") == strict


def test_what_a_severity_costs_is_raised_for_inherited_categories_too_and_never_lowered() -> None:
    mine = Policy.parse(
        'name = "m"\nextends = "balanced"\n[output]\nminor = "refuse"\nmoderate = "flag"'
    )
    private = Category.PRIVACY_VIOLATION
    assert mine.output.action(private, Severity.MINOR) is Action.REFUSE
    assert mine.output.action(private, Severity.MODERATE) is Action.REDACT
    named = Policy.parse(
        'name = "m"\nextends = "balanced"\n[output]\nminor = "refuse"\n'
        '[output.categories."Privacy Violation"]\nminor = "flag"'
    )
    assert named.output.action(private, Severity.MINOR) is Action.FLAG


def test_a_policy_may_extend_a_file_beside_it_that_extends_a_preset(tmp_path: Path) -> None:
    (tmp_path / "house.toml").write_text('name = "house"\nextends = "strict"\nrefusal = "No."')
    (tmp_path / "desk.toml").write_text(
        'name = "desk"\nextends = "house.toml"\n[output]\nminor = "flag"'
    )
    desk = Policy.load(tmp_path / "desk.toml")
    assert desk.refusal == "No."
    assert desk.output.actions == {
        **Policy.load("strict").output.actions, Severity.MINOR: Action.FLAG,
    }  # fmt: skip
    assert Policy.load(str(tmp_path / "desk.toml")) == desk


def test_a_byte_order_mark_is_no_part_of_a_policy(tmp_path: Path) -> None:
    (tmp_path / "windows.toml").write_bytes(b'\xef\xbb\xbfname = "windows"\r\n')
    assert Policy.load(tmp_path / "windows.toml").name == "windows"


# --- what a policy cannot say --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "key", "says"),
    [
        ("[output]\nminor = 'refues'", "output.minor", "did you mean 'refuse'?"),
        ("[output]\nminor = 'Refuse'", "output.minor", "did you mean 'refuse'?"),
        ("[output]\nminor = 3", "output.minor", "3 is not an action"),
        ("[output]\nminor = ['refuse']", "output.minor", "is not an action"),
        ("[output]\nsever = 'refuse'", "output.sever", "did you mean 'severe'?"),
        ("[outptu]\nminor = 'flag'", "outptu", "did you mean 'output'?"),
        ("output = 'refuse'", "output", "expected a table, found 'refuse'"),
        ("[output.categories]\nViolense.minor = 'flag'", "output.categories",
         "did you mean 'Violence'?"),
        ("[output.categories]\nviolence.minor = 'flag'", "output.categories",
         "did you mean 'Violence'?"),
        ("[output.categories]\nViolence = 'flag'", 'output.categories."Violence"',
         "expected a table"),
        ("[output.categories.Violence]\nmino = 'flag'", 'output.categories."Violence".mino',
         "did you mean 'minor'?"),
        ("[output.categories.Violence]\nthreshold = 2", 'output.categories."Violence".threshold',
         "2 is not a probability"),
        ("[output.categories.Violence]\nthresholds.mild = 0.2",
         'output.categories."Violence".thresholds.mild', "unknown key"),
        ("[output.thresholds]\nminor = -0.5", "output.thresholds.minor", "not a probability"),
        ("[output.thresholds]\nminor = nan", "output.thresholds.minor", "not a probability"),
        ("[output.thresholds]\nminor = true", "output.thresholds.minor", "not a probability"),
        ("[output.thresholds]\nmoderat = 0.5", "output.thresholds.moderat",
         "did you mean 'moderate'?"),
        ("on_eror = 'allow'", "on_eror", "did you mean 'on_error'?"),
        ("on_error = 'alow'", "on_error", "did you mean 'allow'?"),
        ("unreadable = 'flagg'", "unreadable", "did you mean 'flag'?"),
        ("version = '1'", "version", "expected int, found '1'"),
        ("version = true", "version", "expected int, found True"),
        ("refusal = 1", "refusal", "expected str, found 1"),
        ("extends = 'balance'", "extends", "did you mean 'balanced'?"),
        ("extends = 1", "extends", "found 1"),
        ("extends = 'no.toml'", "extends", "nor a file beside it"),
        ('"a\\nb" = 1', r"a\nb", "unknown key"),
    ],
)  # fmt: skip
def test_an_error_names_the_file_the_key_and_the_nearest_word_in_one_line(
    tmp_path: Path, toml: str, key: str, says: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'name = "mine"\n{toml}\n')
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert f"key '{key}'" in message
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("name = 'x", "not valid TOML"),
        ("a = " + "[" * 5000, "not valid TOML"),
        ("a = " + "9" * 5000, "not valid TOML: a number has thousands of digits: 64 bits are"),
        ('name = "a"\nversion = 0x' + "F" * 5000, "not valid TOML: a number has more than 64"),
        ('name = "a"\ninput = [{a = 0o' + "7" * 9000 + "}]", "a number has more than 64 bits"),
        ("a = " + "[" * 9999 + "]" * 9999, "not valid TOML: nested too deeply"),
        ("", "key 'name': every policy has one"),
        ("extends = 'strict'", "key 'name': every policy has one of its own"),
        ("name = ''", "key 'name'"),
        ("name = 'a\\nb'\nname2 = 1", "unknown key 'name2'"),
        ('name = "a\\nb"', "on one line"),
        ("name = 7", "expected str, found 7"),
    ],
    ids=lambda text: text[:12],
)
def test_a_policy_that_is_none_is_refused_in_one_line(toml: str, says: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.parse(toml, where="desk.toml")
    assert str(caught.value).startswith("desk.toml: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_that_is_not_there_is_named(tmp_path: Path) -> None:
    for source in ("balancd", tmp_path / "no.toml", tmp_path, "", "x" * 10_000, "a\0b"):
        with pytest.raises(PolicyError, match="neither a preset") as caught:
            Policy.load(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(PolicyError, match="did you mean 'balanced'"):
        Policy.load("balancd")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match=r"p\.toml: cannot be read"):
        Policy.load(tmp_path / "p.toml")


def test_policies_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "a"\nextends = "b.toml"')
    (tmp_path / "b.toml").write_text('name = "b"\nextends = "a.toml"')
    with pytest.raises(PolicyError, match="extends this policy in turn"):
        Policy.load(tmp_path / "a.toml")


def test_a_policy_that_extends_through_too_many_files_is_refused(tmp_path: Path) -> None:
    for n in range(1200):
        (tmp_path / f"{n}.toml").write_text(f'name = "p{n}"\nextends = "{n + 1}.toml"')
    (tmp_path / "1200.toml").write_text('name = "last"')
    with pytest.raises(PolicyError, match=r"49\.toml: key 'extends': 50 files extend one another"):
        Policy.load(tmp_path / "0.toml")
    assert Policy.load(tmp_path / "1151.toml").name == "p1151"  # through 50, which may be


def test_text_alone_may_extend_presets_only() -> None:
    with pytest.raises(PolicyError, match="nor a file beside it"):
        Policy.parse('name = "a"\nextends = "pyproject.toml"')
