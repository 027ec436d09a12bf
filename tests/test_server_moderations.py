"""`/v1/moderations` in OpenAI's shape, asked by unmodified clients."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from openai.types import Moderation, ModerationCreateResponse
from openai.types.moderation import CategoryAppliedInputTypes
from server_kit import WORDS, Running, serving

from guardrail import Category, Guard, ModerationError, Pair, Policy, Severity
from guardrail._server_errors import ApiError
from guardrail._server_moderations import (
    OPENAI_CATEGORIES,
    OPENAI_CATEGORY,
    moderation_answer,
    read_inputs,
)
from guardrail.testing import FakeModerator


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url, api_key="unused", max_retries=0) as client:
        yield client


def test_our_categories_all_stand_under_one_of_openais() -> None:
    assert set(OPENAI_CATEGORY) == set(Category)
    assert set(OPENAI_CATEGORY.values()) <= set(OPENAI_CATEGORIES)
    fields = CategoryAppliedInputTypes.model_fields
    assert set(OPENAI_CATEGORIES) == {field.alias or name for name, field in fields.items()}


def test_the_openai_client_reads_the_answer_as_its_own(client: OpenAI) -> None:
    answer = client.moderations.create(input="a bomb", model="omni-moderation-latest")
    assert answer.id.startswith("modr-")
    assert answer.model == "fake"
    (result,) = answer.results
    assert result.flagged
    assert result.categories.violence
    assert result.category_scores.violence == 1.0
    assert not result.categories.sexual
    verdict: Any = result.guardrail  # type: ignore[attr-defined]
    assert (verdict["action"], verdict["severity"]) == ("refuse", "severe")
    assert verdict["reasons"][0]["category"] == "Violence"


@pytest.mark.parametrize("category", list(Category))
def test_the_shape_is_openais_to_the_letter(category: Category) -> None:
    guard = Guard(FakeModerator({"x": (Severity.SEVERE, category)}))
    data = json.loads(json.dumps(moderation_answer([guard.check("x")], "m")))
    strict = ModerationCreateResponse.model_validate(data)
    (result,) = data["results"]
    for field in ("categories", "category_scores", "category_applied_input_types"):
        assert tuple(result[field]) == OPENAI_CATEGORIES
    assert isinstance(strict.results[0], Moderation)
    assert [n for n, held in result["categories"].items() if held] == [OPENAI_CATEGORY[category]]
    assert result["category_scores"][OPENAI_CATEGORY[category]] == 1.0


def test_what_is_not_judged_says_so(client: OpenAI) -> None:
    result = client.moderations.create(input="a bomb").results[0]
    applied = result.category_applied_input_types
    assert applied.violence == ["text"]
    assert applied.sexual_minors == applied.self_harm_intent == applied.violence_graphic == []
    assert not result.categories.sexual_minors


def test_a_list_of_strings_gives_a_result_each_in_order(client: OpenAI) -> None:
    inputs = ["fine", "a bomb", "", "an insult"]
    results = client.moderations.create(input=inputs).results
    assert [result.flagged for result in results] == [False, True, False, True]
    assert results[3].categories.harassment


def test_parts_are_one_text_together_and_images_are_turned_down(client: OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "fine"}, {"type": "text", "text": "a bomb"}]
    results = client.moderations.create(input=parts).results
    assert [result.flagged for result in results] == [True]
    image: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError, match="only text can be judged"):
        client.moderations.create(input=[*parts, image])


def test_answers_are_judged_with_their_prompt(client: OpenAI) -> None:
    for extra in ({"prompt": "What is that?"}, {"direction": "output"}):
        answer = client.moderations.create(input="a bomb", extra_body={"guardrail": extra})
        verdict: Any = answer.results[0].guardrail  # type: ignore[attr-defined]
        assert verdict["direction"] == "output"
    plain: Any = client.moderations.create(input="a bomb").results[0]
    assert plain.guardrail["direction"] == "input"


async def _ask_async(url: str) -> list[bool]:
    async with AsyncOpenAI(base_url=url, api_key="unused") as client:
        asked = [client.moderations.create(input=f"{i} bomb" if i % 2 else "") for i in range(20)]
        return [answer.results[0].flagged for answer in await asyncio.gather(*asked)]


def test_the_async_client_gets_each_its_own_answer(server: Running) -> None:
    assert asyncio.run(_ask_async(server.url)) == [i % 2 == 1 for i in range(20)]


def test_curl_gets_json(server: Running) -> None:
    done = subprocess.run(
        ["curl", "-s", "--json", '{"input": "a bomb"}', f"{server.url}/moderations"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout)["results"][0]["flagged"] is True


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{", b"\xff\xfe", b'"x"', b"{}", b'{"input": []}', b'{"input": 3}',
        b'{"input": ["a", 1]}', b'{"input": [[1, 2]]}', b'{"input": [{"type": "text"}]}',
        b'{"input": "a", "guardrail": 1}', b'{"input": "a", "guardrail": {"promt": "x"}}',
        b'{"input": "a", "guardrail": {"prompt": "x", "direction": "input"}}',
        b"[" * 100_000,
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)  # fmt: skip
def test_nonsense_is_a_400_in_openais_shape(server: Running, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/moderations", content=body, timeout=30)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.fixed_dictionaries({"input": _JSON}, optional={"guardrail": _JSON}))
def test_any_json_is_read_or_refused(body: dict[str, Any]) -> None:
    try:
        pairs = read_inputs(body, 64)
    except ApiError:
        return
    assert pairs
    assert all(isinstance(pair.text, str) for pair in pairs)


def test_too_many_inputs_are_turned_down(server: Running) -> None:
    answer = httpx.post(f"{server.url}/moderations", json={"input": ["a"] * 65}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_inputs")


def test_a_moderator_that_fails_fails_closed_and_says_so() -> None:
    def broken(_: Any) -> None:
        raise ModerationError("out of order")

    with (
        serving(moderator=FakeModerator(WORDS, on_assess=broken)) as server,
        OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
    ):
        result = client.moderations.create(input="fine").results[0]
        metrics = httpx.get(f"{server.root}/metrics").text
        ready = httpx.get(f"{server.root}/readyz")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "not_ready")
    verdict: Any = result.guardrail  # type: ignore[attr-defined]
    assert result.flagged
    assert (verdict["degraded"], verdict["action"]) == (True, "refuse")
    assert 'guardrail_degraded_total{direction="input"} 1.0' in metrics


def test_callers_hear_what_failed_and_the_log_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "audit.jsonl"
    with serving(audit={"path": str(log)}) as server:
        log.with_name("audit.jsonl.head").unlink()
        answer = httpx.post(f"{server.url}/moderations", json={"input": "fine"})
    verdict = answer.json()["results"][0]["guardrail"]
    assert (verdict["action"], verdict["degraded"], verdict["error"]) == ("refuse", True, "audit")
    assert str(tmp_path) not in answer.text
    assert f"{log}: its head is missing" in caplog.text


def test_what_a_policy_lets_pass_at_its_own_risk_is_not_flagged() -> None:
    policy = Policy.parse('name = "open"\non_error = "allow"')
    (result,) = moderation_answer([policy.fail(Pair("x").direction, "gone")], "m")["results"]
    assert result["flagged"] is False
    assert result["guardrail"]["degraded"] is True
    assert set(result["category_scores"].values()) == {0.0}
