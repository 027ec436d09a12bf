"""LangChain behind a guard: a chat model, an agent's middleware, a chain, a callback handler.

    model = GuardedChatModel(inner=ChatOpenAI(model="..."), guard=guard)
    agent = create_agent(model, tools, middleware=[GuardrailMiddleware(guard=guard)])
    chain = GuardrailRunnable(prompt | model | StrOutputParser(), guard=guard)

A block is an answer: an AIMessage with the refusal text, whose `response_metadata` holds
`finish_reason: "content_filter"` and, as every guarded answer's, the verdict JSON in `guardrail`.
It is no exception, so `with_fallbacks` does not ask an unguarded model instead; `on_block="raise"`
makes it one (`Blocked`).

Needs langchain-core 1.x; `GuardrailMiddleware` needs langchain as well.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from guardrail.errors import require

if not TYPE_CHECKING:  # the error of the imports below would not say which extra is missing
    require("langchain_core", extra="langchain")

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import (
    BaseChatModel,
    LangSmithParams,
    LanguageModelInput,
    ModelProfile,
)
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import (
    Runnable,
    RunnableBinding,
    RunnableBranch,
    RunnableLambda,
    RunnableParallel,
    RunnableSequence,
)
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, Field, field_validator, model_validator

from guardrail._langchain_chain import GuardrailCallbackHandler, GuardrailRunnable
from guardrail._langchain_drive import Run
from guardrail.guard import Guard
from guardrail.stream import StreamConfig

if TYPE_CHECKING:
    from guardrail._langchain_agent import GuardrailMiddleware

__all__ = [
    "GuardedChatModel",
    "GuardrailCallbackHandler",
    "GuardrailMiddleware",
    "GuardrailRunnable",
]


def __getattr__(name: str) -> Any:
    if name != "GuardrailMiddleware":
        raise AttributeError(f"module 'guardrail.langchain' has no attribute {name!r}")
    require("langchain", extra="langchain")
    from guardrail._langchain_agent import GuardrailMiddleware  # brings langgraph along

    return GuardrailMiddleware


class GuardedChatModel(BaseChatModel):
    """A chat model behind a guard; itself a chat model, for every place that takes one.

        model = GuardedChatModel(inner=ChatOpenAI(model="..."), guard=guard)

    inner: any BaseChatModel. It runs detached: no callback sees its tokens, neither the caller's
        nor those that it was made with; attach them to this model, which shows what was judged.
        Its cache and its rate limiter work on; this model caches nothing, so that a cached answer
        is judged again. Of several generations (n > 1) the first is judged and given.
    guard: `Guard()` by default.
    on_block, context_turns, regenerate_tries, stream_config, best_of: as in
        `guardrail.GuardedChat`; tool calls go with the answer that is chosen by its text.

    Text streams as it is judged. Tool calls, reasoning and other parts of an answer are held back
    until they are complete and judged; a tool call cannot be masked: where the policy says redact,
    it is refused. An answer with a part that is no text (an image) follows the policy's `on_error`.

    `with_structured_output` gives None for a block (`raw` holds it with `include_raw=True`).
    Raises what the inner model raises, ValueError on messages without a user's, Blocked where
    asked to.
    """

    # A guard, a policy or an option misspelt must not leave the default guard in its place.
    model_config = ConfigDict(extra="forbid")

    inner: BaseChatModel = Field(repr=False)
    guard: Guard = Field(default_factory=Guard, repr=False, exclude=True)
    on_block: Literal["refuse", "raise"] = "refuse"
    context_turns: int = 4
    regenerate_tries: int = 2
    stream_config: StreamConfig = Field(default_factory=StreamConfig)
    best_of: Any = Field(default=None, repr=False, exclude=True)
    cache: Any = Field(default=False, exclude=True)

    @field_validator("inner", mode="before")
    @classmethod
    def _is_model(cls, inner: object) -> object:
        if not isinstance(inner, BaseChatModel):
            raise TypeError(
                f"inner must be a BaseChatModel, not {type(inner).__name__}: guard the model "
                "first, then bind to it, as in GuardedChatModel(inner=model).bind_tools(tools)"
            )
        return inner

    @model_validator(mode="after")
    def _is_whole(self) -> GuardedChatModel:
        _ = self._run  # says what is wrong with the options
        if "output_version" not in self.model_fields_set:
            self.output_version = self.inner.output_version
        return self

    # --- what the inner model is asked for

    @property
    def _llm_type(self) -> str:
        return f"guarded-{self.inner._llm_type}"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**self.inner._identifying_params, "guardrail_policy": self.guard.policy.id}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self.inner._get_ls_params(stop=stop, **kwargs)

    def _resolve_model_profile(self) -> ModelProfile | None:
        return self.inner.profile

    def get_token_ids(self, text: str) -> list[int]:
        return self.inner.get_token_ids(text)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        return self.inner.get_num_tokens_from_messages(messages, tools)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The inner model's way to bind tools, guarded."""
        bound = self.inner.bind_tools(tools, tool_choice=tool_choice, **kwargs)
        return cast("Runnable[LanguageModelInput, AIMessage]", self._put_into(bound))

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """The inner model's way to structured output, guarded; None for a block."""
        chain = self.inner.with_structured_output(schema, include_raw=include_raw, **kwargs)
        return self._put_into(chain)

    def _put_into(self, chain: Runnable[Any, Any]) -> Runnable[Any, Any]:
        guarded = _replace_model(chain, lambda inner: self.model_copy(update={"inner": inner}))
        if guarded is chain:
            raise NotImplementedError(
                f"{type(self.inner).__name__} gave a {type(chain).__name__} in which the guard "
                "cannot find the model; wrap the chain in GuardrailRunnable instead"
            )
        return guarded

    # --- answering

    @property
    def _run(self) -> Run:
        return Run(
            self.guard,
            self.on_block,
            self.context_turns,
            self.regenerate_tries,
            self.stream_config,
            self.best_of,
        )

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        def once(turns: list[BaseMessage]) -> Iterator[BaseMessage]:
            yield self._inner_whole(turns, stop, kwargs)

        answer = self._run.answer()
        given = list(self._run.stream(messages, once, answer, whole=True))
        return _result(answer.joined(given))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        async def once(turns: list[BaseMessage]) -> AsyncIterator[BaseMessage]:
            result = await self.inner._agenerate_with_cache(turns, stop=stop, **kwargs)
            yield result.generations[0].message

        answer = self._run.answer()
        given = [piece async for piece in self._run.astream(messages, once, answer, whole=True)]
        return _result(answer.joined(given))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        def pieces(turns: list[BaseMessage]) -> Iterator[BaseMessage]:
            if not self.inner._should_stream(async_api=False, **{**kwargs, "stream": True}):
                yield self._inner_whole(turns, stop, kwargs)
                return
            if self.inner.rate_limiter:
                self.inner.rate_limiter.acquire(blocking=True)
            for chunk in self.inner._stream(turns, stop=stop, **kwargs):
                yield _with_metadata(chunk)

        for piece, _ in self._run.stream(messages, pieces, self._run.answer()):
            yield ChatGenerationChunk(message=cast("AIMessageChunk", piece))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async def pieces(turns: list[BaseMessage]) -> AsyncIterator[BaseMessage]:
            if not self.inner._should_stream(async_api=True, **{**kwargs, "stream": True}):
                result = await self.inner._agenerate_with_cache(turns, stop=stop, **kwargs)
                yield result.generations[0].message
                return
            if self.inner.rate_limiter:
                await self.inner.rate_limiter.aacquire(blocking=True)
            chunks = self.inner._astream(turns, stop=stop, **kwargs)
            try:
                async for chunk in chunks:
                    yield _with_metadata(chunk)
            finally:  # `async for` leaves that to the garbage collector
                if (aclose := getattr(chunks, "aclose", None)) is not None:
                    await aclose()

        async for piece, _ in self._run.astream(messages, pieces, self._run.answer()):
            yield ChatGenerationChunk(message=cast("AIMessageChunk", piece))

    def _inner_whole(
        self, turns: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> BaseMessage:
        result = self.inner._generate_with_cache(turns, stop=stop, **kwargs)
        return result.generations[0].message


def _with_metadata(chunk: ChatGenerationChunk) -> BaseMessage:
    metadata = {**(chunk.generation_info or {}), **chunk.message.response_metadata}
    return chunk.message.model_copy(update={"response_metadata": metadata})


def _result(message: AIMessage) -> ChatResult:
    return ChatResult(generations=[ChatGeneration(message=message)])


def _replace_model(
    part: Runnable[Any, Any], wrap: Callable[[BaseChatModel], BaseChatModel]
) -> Runnable[Any, Any]:
    """`part` with the model at its head wrapped; `part` itself where there is none."""
    match part:
        case BaseChatModel():
            return wrap(part)
        case RunnableBinding():
            bound = _replace_model(part.bound, wrap)
            return part if bound is part.bound else part.model_copy(update={"bound": bound})
        case RunnableParallel():
            steps = {key: _replace_model(step, wrap) for key, step in part.steps__.items()}
            unchanged = all(steps[key] is step for key, step in part.steps__.items())
            return part if unchanged else RunnableParallel(steps)
        case RunnableSequence():
            first, *rest = part.steps
            head = _replace_model(first, wrap)
            if head is first:
                return part
            if not isinstance(head, RunnableParallel):  # a refusal is nothing to parse
                after = rest[0] if len(rest) == 1 else RunnableSequence(*rest)
                rest = [RunnableBranch((_is_blocked, RunnableLambda(lambda _: None)), after)]
            return RunnableSequence(head, *rest)
    return part


def _is_blocked(message: object) -> bool:
    return (
        isinstance(message, AIMessage)
        and message.response_metadata.get("finish_reason") == "content_filter"
    )
