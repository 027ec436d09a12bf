"""An annotator behind an OpenAI-compatible endpoint, with the rubric as its prompt.

Structured output by JSON schema; a server that knows none is asked for a JSON object, then for
plain JSON. An answer that does not keep to the schema is asked again with what was wrong with it.
API: https://platform.openai.com/docs/guides/structured-outputs
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from guardrail.errors import GuardrailError, UpstreamError, require
from guardrail.taxonomy import Category
from training.annotation.ai import RUBRIC, Answer, Failed, Question
from training.annotation.labels import (
    AnnotationError,
    Choice,
    Kind,
    Label,
    PairLabel,
    Preference,
    Role,
    SafetyLabel,
)

_FORMATS = ("json_schema", "json_object", "none")
_OTHER: dict[Choice, Choice] = {0: 1, 1: 0, "tie": "tie"}


@dataclass(frozen=True)
class Price:
    """In any currency, per million tokens; 0 for a model of one's own."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt: int, completion: int) -> float:
        return (prompt * self.prompt + completion * self.completion) / 1e6


class Endpoint:
    """A chat model as annotator.

    url: the API's base, e.g. `http://localhost:11434/v1`; None is OpenAI's. api_key: None takes
    `OPENAI_API_KEY`. retries: of a call that fails (429, 5xx, no connection), with backoff and
    Retry-After; again: how often an unusable answer is asked again.

    Raises MissingExtra without the openai package, AnnotationError where it cannot be used.
    """

    role: Role = "ai"
    kinds: tuple[Kind, ...] = ("item", "pair")
    batch = 1

    def __init__(
        self,
        model: str,
        *,
        url: str | None = None,
        api_key: str | None = None,
        preference: Preference = "dual",
        price: Price | None = None,
        rubric: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        again: int = 2,
    ) -> None:
        self._openai: Any = require("openai", extra="openai")
        if url is not None:
            _check_url(url)  # the client says only "Connection error.", and when it is asked
        try:
            self._client = self._openai.OpenAI(
                base_url=url, api_key=api_key, timeout=timeout, max_retries=retries
            )
        except self._openai.OpenAIError as error:
            raise AnnotationError(f"the endpoint cannot be used: {_line(error)}") from None
        self.name = f"ai:{model}"
        self._model, self._preference, self._again = model, preference, again
        self._price = price or Price()
        self._rubric = rubric or RUBRIC.read_text(encoding="utf-8")
        self._format = 0
        self._lock = threading.Lock()

    def answer(self, questions: Sequence[Question]) -> list[Answer | Failed]:
        return [self._one(question) for question in questions]

    def _one(self, question: Question) -> Answer | Failed:
        messages = messages_for(question, self._rubric, self._preference)
        schema = schema_for(question.kind, self._preference)
        tokens, cost, problem = 0, 0.0, ""
        for _ in range(1 + self._again):
            text, used_in, used_out = self._ask(messages, schema)
            tokens += used_in + used_out
            cost += self._price.of(used_in, used_out)
            try:
                label, reason = parse(text, question, self._preference)
            except AnnotationError as error:
                problem = str(error)
                messages = [
                    *messages,
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": f"Not usable: {problem}. Answer again, JSON only."},
                ]
                continue
            return Answer(label, {"tokens": tokens, "cost": cost, "reason": reason})
        spent = {"tokens": tokens, "cost": cost}
        return Failed(f"{self.name} gave no usable answer: {problem}", spent)

    def _ask(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]
    ) -> tuple[str, int, int]:
        """The answer's text and what it cost: prompt tokens, completion tokens."""
        while True:
            form = self._format
            extra = {} if _FORMATS[form] == "none" else {"response_format": _format(form, schema)}
            try:
                reply = self._client.chat.completions.create(
                    model=self._model, messages=messages, temperature=0, **extra
                )
            except (
                self._openai.BadRequestError,
                self._openai.UnprocessableEntityError,
            ) as error:
                # Servers that know no response_format say so with a 400 or 422; once is enough.
                if form + 1 == len(_FORMATS) or "response_format" not in str(error):
                    raise GuardrailError(f"{self.name}: {_line(error)}") from None
                with self._lock:
                    self._format = max(self._format, form + 1)
                continue
            except self._openai.OpenAIError as error:
                raise GuardrailError(
                    f"{self.name}: {_line(error)}: what is labelled is kept; run it again"
                ) from None
            if isinstance(reply, str):  # a web page, say
                raise GuardrailError(
                    f"{self.name}: answered with what is no chat completion: give the API's base "
                    "as --url, as http://localhost:11434/v1"
                )
            usage = reply.usage
            text = reply.choices[0].message.content if reply.choices else None
            return (
                text or "",
                usage.prompt_tokens if usage else 0,
                usage.completion_tokens if usage else 0,
            )


def _check_url(url: str) -> None:
    from guardrail.upstream import endpoint

    try:
        endpoint(url)
    except UpstreamError as error:
        raise AnnotationError(f"{error}: give its base, as http://localhost:11434/v1") from None


def messages_for(question: Question, rubric: str, preference: Preference) -> list[dict[str, str]]:
    """System: the rubric. User: the texts as JSON, so that none of them can pass for the task."""
    if question.kind == "item":
        texts = {"prompt": question.prompt, "response": question.responses[0]}
        asked = "Label this text by the rubric: severity, categories, and a short reason."
    else:
        texts = {
            "prompt": question.prompt,
            "response_a": question.responses[0],
            "response_b": question.responses[1],
        }
        names = ", ".join(questions_of(preference))
        asked = f"Compare the two responses by the rubric: {names} (A, B or tie); a short reason."
    return [
        {"role": "system", "content": rubric},
        {"role": "user", "content": f"{asked}\n\n{json.dumps(texts, ensure_ascii=False)}"},
    ]


def questions_of(preference: Preference) -> tuple[str, ...]:
    dual = ("more_helpful", "less_harmful")
    return {"dual": dual, "single": ("single",), "both": (*dual, "single")}[preference]


def schema_for(kind: Kind, preference: Preference) -> dict[str, Any]:
    """JSON schema of an answer; strict: every key required, none beside them."""
    if kind == "item":
        properties: dict[str, Any] = {
            "reason": {"type": "string"},
            "severity": {"type": "integer", "enum": [0, 1, 2, 3]},
            "categories": {
                "type": "array",
                "items": {"type": "string", "enum": [c.value for c in Category]},
            },
        }
    else:
        choice = {"type": "string", "enum": ["A", "B", "tie"]}
        properties = {"reason": {"type": "string"}}
        properties |= dict.fromkeys(questions_of(preference), choice)
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def parse(text: str, question: Question, preference: Preference) -> tuple[Label, str]:
    """The label and its reason. Raises AnnotationError saying what is wrong with the answer."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        data = json.loads(found.group(0) if found else text)
    except ValueError:
        raise AnnotationError("the answer is not JSON") from None
    if not isinstance(data, dict):
        raise AnnotationError("the answer is not a JSON object")
    reason = str(data.get("reason", ""))
    if question.kind == "pair":
        sides: dict[str, Choice] = {"a": 0, "b": 1, "tie": "tie"}
        choices: dict[str, Choice] = {}
        for name in questions_of(preference):
            said = str(data.get(name)).lower()
            if said not in sides:
                raise AnnotationError(f"{name} is A, B or tie, not {data.get(name)!r}")
            shown = sides[said]
            choices[name] = _OTHER[shown] if question.swapped else shown
        return PairLabel(**choices), reason
    severity, names = data.get("severity"), data.get("categories")
    if isinstance(severity, bool) or severity not in (0, 1, 2, 3):
        raise AnnotationError(f"severity is 0, 1, 2 or 3, not {severity!r}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AnnotationError(f"categories is a list of names, not {names!r}")
    label = SafetyLabel(severity == 0, severity, tuple(names))
    if not label.complete:
        raise AnnotationError("an unsafe text has at least one category")
    return label, reason


def _format(form: int, schema: Mapping[str, Any]) -> dict[str, Any]:
    if _FORMATS[form] == "json_object":
        return {"type": "json_object"}
    named = {"name": "annotation", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": named}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


assert set(get_args(Choice)) == set(_OTHER)
