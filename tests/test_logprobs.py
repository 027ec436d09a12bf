"""Log probabilities beside an answer spell what was judged and goes out, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from openai import BadRequestError, OpenAI
from server_kit import WORDS, ChatApi, serving

from guardrail import Guard, Policy
from guardrail._logprobs import of_text
from guardrail.langchain import GuardedChatModel
from guardrail.openai import guard_openai
from guardrail.testing import FakeModerator

ASKED: Any = [{"role": "user", "content": "Which city?"}]
REDACTS = """
name = "redacts"
extends = "balanced"
[output.categories."Privacy Violation"]
moderate = "redact"
[output.categories."Insulting Behavior"]
minor = "regenerate"
"""


def tokens(*words: str, beside: str = "the bomb") -> list[dict[str, Any]]:
    """As an API says them: each with an alternative."""
    return [
        {"token": w, "bytes": list(w.encode()), "logprob": -0.5}
        | {"top_logprobs": [{"token": beside, "bytes": list(beside.encode()), "logprob": -1.0}]}
        for w in words
    ]


def spelled(found: list[dict[str, Any]] | None) -> list[str] | None:
    return None if found is None else [t["token"] for t in found]


@given(st.lists(st.text(max_size=4)), st.text(max_size=9))
def test_what_goes_out_spells_the_text_or_is_nothing(words: list[str], text: str) -> None:
    found = of_text(tokens(*words), text)
    assert found is None or "".join(t["token"] for t in found).strip() == text.strip()
    whole = of_text(tokens(*words), "".join(words))
    assert (whole is not None) == bool("".join(words).strip())


def test_alternatives_and_what_no_class_knows_are_left_out() -> None:
    [found] = of_text([token | {"note": "bomb"} for token in tokens("Paris")], "Paris") or []
    assert found == {
        "token": "Paris",
        "bytes": list(b"Paris"),
        "logprob": -0.5,
        "top_logprobs": [],
    }


@pytest.mark.parametrize(
    ("said", "text", "kept"),
    [
        (["Pa", "ris", "<|eot|>"], "Paris", ["Pa", "ris"]),
        (["<think>", "bomb", "</think>", " Paris"], "Paris", [" Paris"]),
        (["Not ", "Paris", "?", " ", "Paris", "."], "Paris.", ["Paris", "."]),
        (["Paris bomb"], "Paris", None),
        (["How to", " bomb"], "I cannot help.", None),
        (["Paris"], "", None),
    ],
)
def test_tokens_around_the_text_are_left_out(
    said: list[str], text: str, kept: list[str] | None
) -> None:
    assert spelled(of_text(tokens(*said), text)) == kept


def test_bytes_and_not_the_name_of_a_token_are_what_it_spells() -> None:
    named = tokens("Par", "is")
    named[0]["token"] = "bomb"
    assert spelled(of_text(named, "Paris")) == ["Par", "is"]
    cut = [{"token": "bytes:\\xc3", "bytes": [195], "logprob": -1}]
    cut.append({"token": "bytes:\\xa9", "bytes": [169], "logprob": -1})
    assert [t["bytes"] for t in of_text(cut, "é") or []] == [[195], [169]]
    assert spelled(of_text([{"token": "Paris", "bytes": None, "logprob": -1}], "Paris"))


@pytest.mark.parametrize(
    "shape",
    [
        None,
        5,
        "bomb",
        {"tokens": ["bomb"]},
        [5],
        [{}],
        [{"token": 5}],
        [{"token": "Paris"}],
        [{"token": "Paris", "bytes": ["x"], "logprob": 1}],
        [{"token": "Paris", "bytes": [999], "logprob": 1}],
        [{"token": "Paris", "logprob": "bomb"}],
        [{"token": "\ud83d", "logprob": 1}],
    ],
)
def test_another_shape_is_nothing(shape: object) -> None:
    assert of_text(shape, "Paris") is None


# --- where they come from ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def the_api() -> Iterator[ChatApi]:
    api = ChatApi()
    yield api
    api.running.stop()


@pytest.fixture(params=["served", "guard_openai"])
def client(the_api: ChatApi, request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[OpenAI]:
    the_api.reset()
    if request.param == "guard_openai":
        guard = Guard(FakeModerator(WORDS), Policy.parse(REDACTS))
        with OpenAI(api_key="k", base_url=the_api.url, max_retries=0) as plain:
            yield guard_openai(plain, guard)
        return
    (tmp_path / "redacts.toml").write_text(REDACTS)
    named = {"policies": {"redacts": str(tmp_path / "redacts.toml")}, "policy": "redacts"}
    with (
        serving(upstream=the_api.url, **named) as running,
        OpenAI(api_key="k", base_url=running.url, max_retries=0) as plain,
    ):
        yield plain


def says(api: ChatApi, *words: str, message: Any = None, **logprobs: Any) -> None:
    """An answer of these tokens."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(words), **(message or {})},
        "finish_reason": "stop",
        "logprobs": logprobs or {"content": tokens(*words), "refusal": None},
    }
    api.failure = (200, api._whole() | {"choices": [choice]}, {})


def ask(client: OpenAI) -> tuple[Any, str]:
    """The choice, and all that came, but for the verdicts."""
    answer = client.chat.completions.create(model="m", messages=ASKED, logprobs=True)
    data = answer.model_dump(warnings=False)
    data["choices"][0].pop("guardrail")
    data.pop("guardrail")
    return answer.choices[0], json.dumps(data)


def test_an_answer_that_goes_out_as_it_is_keeps_its_own_tokens_alone(
    client: OpenAI, the_api: ChatApi
) -> None:
    says(the_api, "Pa", "ris", ".")
    choice, came = ask(client)
    assert choice.message.content == "Paris."
    assert [t.token for t in choice.logprobs.content] == ["Pa", "ris", "."]
    assert choice.logprobs.content[0].logprob == -0.5
    assert choice.logprobs.content[0].top_logprobs == []
    assert "bomb" not in came


@pytest.mark.parametrize(
    ("words", "finish"),
    [
        (["Take", " the", " bo", "mb", "."], "content_filter"),
        (["What", " an", " insu", "lt", "."], "content_filter"),  # regenerate
        (["It", " is", " ssn", "-1234", "."], "stop"),  # redact
    ],
)
def test_no_token_of_a_changed_or_withheld_answer_goes_out(
    client: OpenAI, the_api: ChatApi, words: list[str], finish: str
) -> None:
    says(the_api, *words)
    choice, came = ask(client)
    assert choice.finish_reason == finish
    assert choice.logprobs is None
    assert '"token"' not in came


def test_tokens_that_are_not_of_the_answer_do_not_go_out(client: OpenAI, the_api: ChatApi) -> None:
    said = tokens("How to make a bomb")
    says(the_api, "Paris.", content=said, refusal=said, tokens=["bomb"], text_offset=[0])
    choice, came = ask(client)
    assert choice.message.content == "Paris."
    assert choice.logprobs is None
    assert "bomb" not in came


def test_tokens_of_a_refusal_of_the_model_go_out_with_it(client: OpenAI, the_api: ChatApi) -> None:
    message = {"content": None, "refusal": "I cannot."}
    says(the_api, message=message, content=None, refusal=tokens("I", " cannot", "."))
    choice, _ = ask(client)
    assert [t.token for t in choice.logprobs.refusal] == ["I", " cannot", "."]


def test_alternatives_are_not_asked_for(client: OpenAI, the_api: ChatApi) -> None:
    with pytest.raises((ValueError, BadRequestError), match="never judged: leave it out"):
        client.chat.completions.create(model="m", messages=ASKED, logprobs=True, top_logprobs=2)
    assert the_api.requests == []


@pytest.mark.parametrize(
    ("words", "kept"), [(["Pa", "ris", "."], True), (["A", " bo", "mb"], False)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_langchain_metadata_holds_the_tokens_of_the_answer_alone(
    words: list[str], kept: bool, stream: bool
) -> None:
    class Telling(GenericFakeChatModel):
        def _generate(self, *_: Any, **__: Any) -> ChatResult:
            metadata = {"logprobs": {"content": tokens(*words, beside="a bomb"), "refusal": None}}
            message = AIMessage("".join(words), response_metadata=metadata)
            return ChatResult(generations=[ChatGeneration(message=message)])

        def _should_stream(self, **_: Any) -> bool:
            return False

    guard = Guard(FakeModerator(WORDS), Policy.load("balanced"))
    model = GuardedChatModel(inner=Telling(messages=iter([])), guard=guard)
    if stream:
        first, *others = model.stream("Which city?")
        answer: Any = first.__add__(others)  # type: ignore[arg-type]
    else:
        answer = model.invoke("Which city?")
    logprobs = answer.response_metadata.get("logprobs")
    assert spelled(logprobs and logprobs["content"]) == (words if kept else None)
    assert "bomb" not in str(logprobs)
