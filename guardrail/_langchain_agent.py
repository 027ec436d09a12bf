"""`GuardrailMiddleware`: every model call of a `create_agent` agent behind the guard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain.agents.structured_output import StructuredOutputValidationError
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import RunnableConfig
from pydantic import PrivateAttr

from guardrail.errors import GuardrailError
from guardrail.guard import Guard, as_guard
from guardrail.langchain import GuardedChatModel
from guardrail.stream import StreamConfig

if TYPE_CHECKING:
    from guardrail.score import BestOf

__all__ = ["GuardrailMiddleware"]


class GuardrailMiddleware(AgentMiddleware[Any, Any, Any]):
    """Puts the guard around the model of an agent, so that no stream mode shows what was not
    judged.

        agent = create_agent(model, tools, middleware=[GuardrailMiddleware(guard=guard)])

    Put it last: a middleware after it could put another model or another answer in its place. Then
    the agent stops with GuardrailError. A middleware with a model of its own (a summariser) takes a
    `GuardedChatModel` where its words may reach the user.

    What the user says is judged before the model is called; results of tools are not user text, and
    go to the model as they are. A refusal calls no tool, so the agent ends with it;
    `structured_response` is None then. Options as in `GuardedChatModel`.
    """

    def __init__(
        self,
        guard: Guard | None = None,
        *,
        on_block: Literal["refuse", "raise"] = "refuse",
        context_turns: int = 4,
        regenerate_tries: int = 2,
        stream_config: StreamConfig | None = None,
        best_of: BestOf | None = None,
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {
            "guard": as_guard(guard),
            "on_block": on_block,
            "context_turns": context_turns,
            "regenerate_tries": regenerate_tries,
            "stream_config": stream_config or StreamConfig(),
            "best_of": best_of,
        }

    def wrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], ModelResponse[Any]],
    ) -> ModelResponse[Any]:
        model = self._guarded(request.model)
        try:
            response = handler(request.override(model=model))
        except StructuredOutputValidationError as error:
            response = _refusal(error)
        return _judged(response, model)

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        model = self._guarded(request.model)
        try:
            response = await handler(request.override(model=model))
        except StructuredOutputValidationError as error:
            response = _refusal(error)
        return _judged(response, model)

    def _guarded(self, model: BaseChatModel) -> _Remembering:
        return _Remembering(inner=model, **self._options)


class _Remembering(GuardedChatModel):
    """Knows what it gave, that of its copies (with tools bound) too."""

    _given: set[str] = PrivateAttr(default_factory=set)  # shared with its copies

    def get_name(self, suffix: str | None = None, *, name: str | None = None) -> str:
        return super().get_name(suffix, name=name or GuardedChatModel.__name__)

    def invoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        message = super().invoke(input, config, **kwargs)
        self._given.add(_parts(message))
        return message

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        message = await super().ainvoke(input, config, **kwargs)
        self._given.add(_parts(message))
        return message

    def gave(self, message: AIMessage) -> bool:
        return _parts(message) in self._given


def _parts(message: AIMessage) -> str:
    """All that a model says in a message; written down, for a message can be edited in place."""
    calls = (message.tool_calls, message.invalid_tool_calls)
    return repr((message.content, *calls, message.additional_kwargs))


def _refusal(error: StructuredOutputValidationError) -> ModelResponse[Any]:
    """A refusal does not fit the schema that was asked for: it is the answer nevertheless."""
    if error.ai_message.response_metadata.get("finish_reason") != "content_filter":
        raise error
    return ModelResponse(result=[error.ai_message])


def _judged(response: ModelResponse[Any], model: _Remembering) -> ModelResponse[Any]:
    messages: Sequence[BaseMessage] = response.result
    for message in messages:
        if isinstance(message, AIMessage) and not model.gave(message):
            raise GuardrailError(
                "an answer did not pass the guard: another middleware replaced the model or the "
                "answer; put GuardrailMiddleware last in the list of middleware"
            )
    return response
