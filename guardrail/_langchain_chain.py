"""`GuardrailRunnable`, a guarded LCEL chain, and `GuardrailCallbackHandler`, which only watches."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal
from uuid import UUID

from langchain_core.callbacks import (
    AsyncCallbackManagerForChainRun,
    BaseCallbackHandler,
    CallbackManagerForChainRun,
)
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, convert_to_messages
from langchain_core.outputs import ChatGeneration, Generation, LLMResult
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue
from langchain_core.runnables import Runnable, RunnableConfig

from guardrail._langchain_answer import all_words, to_turns
from guardrail._langchain_drive import Piece, Run, detached_config
from guardrail.conversation import Check, Rules, asked, conversation
from guardrail.errors import Blocked
from guardrail.guard import Guard, as_guard
from guardrail.stream import StreamConfig
from guardrail.verdict import Pair, Verdict

__all__ = ["GuardrailCallbackHandler", "GuardrailRunnable"]

logger = logging.getLogger("guardrail")


class GuardrailRunnable(Runnable[Any, Any]):
    """An LCEL chain behind a guard: what goes in and what comes out of it is judged.

        chain = GuardrailRunnable(prompt | model | StrOutputParser(), guard=guard)
        chain = retrieve | GuardrailRunnable(prompt | model, guard=guard, input_key="question")

    chain: answers with str or AIMessage, whole or streamed. It has to hold the model: it runs
        detached, so that `astream_events` shows what was judged and nothing from inside of it. A
        gate behind the model, in the same pipe, could not do that.
    input_key: where the input is a dict, the key of the user's text or messages.
    on_block, context_turns, stream_config: as in `guardrail.GuardedChat`; `regenerate` means
        refuse, for a chain has no place for the safety instruction.

    A block is the refusal text where the chain gives str, else the AIMessage that
    `GuardedChatModel` gives. Raises what the chain raises, TypeError on input without a text,
    Blocked where asked to.
    """

    def __init__(
        self,
        chain: Runnable[Any, Any],
        guard: Guard | None = None,
        *,
        input_key: str | None = None,
        on_block: Literal["refuse", "raise"] = "refuse",
        context_turns: int = 4,
        stream_config: StreamConfig | None = None,
    ) -> None:
        if not isinstance(chain, Runnable):
            raise TypeError(f"a chain must be a Runnable, not {type(chain).__name__}")
        self._chain = chain
        self._key = input_key
        self._run = Run(
            as_guard(guard),
            on_block,
            context_turns,
            0,
            stream_config or StreamConfig(),
        )
        self._plain = chain.OutputType is str

    @property
    def InputType(self) -> Any:  # noqa: N802
        return self._chain.InputType

    @property
    def OutputType(self) -> Any:  # noqa: N802
        return self._chain.OutputType

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return self._call_with_config(self._invoke, input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return await self._acall_with_config(self._ainvoke, input, config, **kwargs)

    def stream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Any]:
        yield from self._transform_stream_with_config(iter([input]), self._stream, config, **kwargs)

    async def astream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        async def once() -> AsyncIterator[Any]:
            yield input

        async for piece in self._atransform_stream_with_config(
            once(), self._astream, config, **kwargs
        ):
            yield piece

    def _invoke(
        self,
        input: Any,
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> Any:
        def once(turns: list[BaseMessage]) -> Iterator[object]:
            yield self._chain.invoke(self._input(input, turns), detached_config(config), **kwargs)

        answer = self._run.answer(plain=self._plain)
        given = list(self._run.stream(self._messages(input), once, answer, whole=True))
        return answer.joined(given)

    async def _ainvoke(
        self,
        input: Any,
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> Any:
        async def once(turns: list[BaseMessage]) -> AsyncIterator[object]:
            inner = self._input(input, turns)
            yield await self._chain.ainvoke(inner, detached_config(config), **kwargs)

        answer = self._run.answer(plain=self._plain)
        messages = self._messages(input)
        run = self._run.astream(messages, once, answer, whole=True)
        return answer.joined([piece async for piece in run])

    def _stream(
        self,
        inputs: Iterator[Any],
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> Iterator[Piece]:
        given = next(inputs)

        def pieces(turns: list[BaseMessage]) -> Iterator[object]:
            return self._chain.stream(self._input(given, turns), detached_config(config), **kwargs)

        answer = self._run.answer(plain=self._plain)
        for piece, _ in self._run.stream(self._messages(given), pieces, answer):
            yield piece

    async def _astream(
        self,
        inputs: AsyncIterator[Any],
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> AsyncIterator[Piece]:
        given = await anext(inputs)

        def pieces(turns: list[BaseMessage]) -> AsyncIterator[object]:
            return self._chain.astream(self._input(given, turns), detached_config(config), **kwargs)

        answer = self._run.answer(plain=self._plain)
        async for piece, _ in self._run.astream(self._messages(given), pieces, answer):
            yield piece

    def _messages(self, input: Any) -> list[BaseMessage]:
        if isinstance(input, Mapping):
            if self._key is None or self._key not in input:
                raise TypeError(
                    f"the input is a dict with {sorted(map(str, input))}: name the key of the "
                    f"user's text with GuardrailRunnable(..., input_key=...), not {self._key!r}"
                )
            return self._messages(input[self._key])
        match input:
            case str():
                return [HumanMessage(input)]
            case PromptValue():
                return input.to_messages()
            case BaseMessage():
                return [input]
            case Sequence():
                return convert_to_messages(input)
        raise TypeError(
            f"a guarded chain takes str, messages, a prompt or a dict of them, "
            f"not {type(input).__name__}"
        )

    def _input(self, input: Any, turns: list[BaseMessage]) -> Any:
        """The input as it came; where a passage was masked, of the same kind."""
        if isinstance(input, Mapping):
            return {**input, self._key: self._input(input[self._key], turns)}
        if turns == self._messages(input):
            return input
        match input:
            case str():
                return str(turns[0].text)
            case StringPromptValue():
                return StringPromptValue(text=str(turns[0].text))
            case PromptValue():
                return ChatPromptValue(messages=turns)
            case BaseMessage():
                return turns[0]
        return turns


class GuardrailCallbackHandler(BaseCallbackHandler):
    """Watches models that are not guarded: judges what goes in and out, and stops harmful input.

        model.invoke(messages, config={"callbacks": [GuardrailCallbackHandler(guard=guard)]})

    What a callback can do: raise Blocked before the model is called, on an input that the policy
    does not deliver as it is (a callback cannot mask); and give each verdict to the guard's `audit`
    and to `on_verdict`.

    What it cannot do: **it recalls nothing.** An answer is judged at its end; by then its tokens
    have been streamed, and a caller may have shown them. Use `GuardedChatModel` or
    `GuardrailMiddleware` where output has to be kept back. LangChain moreover swallows what a
    handler raises, with a warning in its log, unless the handler says `raise_error`: this one does,
    so that Blocked, and whatever `on_verdict` raises, reaches the caller. Other handlers of the
    same call have seen the input all the same, and `with_fallbacks` takes Blocked for a failure and
    asks the next model: pass the handler to that one too, in the config of the whole chain.

    on_verdict: called with every verdict, inputs' and outputs'.
    """

    raise_error = True
    run_inline = True  # in another thread, it would come too late

    def __init__(
        self,
        guard: Guard | None = None,
        *,
        on_verdict: Callable[[Verdict], None] | None = None,
        context_turns: int = 4,
    ) -> None:
        self._guard = as_guard(guard)
        self._on_verdict = on_verdict
        self._rules = Rules(self._guard.policy, StreamConfig(), "raise", context_turns)
        self._prompts: dict[UUID, str] = {}

    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        **kwargs: Any,
    ) -> None:
        for turns in messages:
            self._prompts[run_id] = self._judge_input(turns)

    def on_llm_start(
        self,
        serialized: dict[str, Any] | None,
        prompts: list[str],
        *,
        run_id: UUID,
        **kwargs: Any,
    ) -> None:
        for prompt in prompts:
            self._prompts[run_id] = self._judge_input([HumanMessage(prompt)])

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        prompt = self._prompts.pop(run_id, "")
        texts = [_said(one) for answers in response.generations for one in answers]
        for verdict in self._guard.check_many([Pair(prompt, text) for text in texts if text]):
            if not verdict.delivers:
                logger.warning("an answer went out unguarded: %s", verdict.summary())
            self._tell(verdict)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._prompts.pop(run_id, None)

    def _judge_input(self, messages: list[BaseMessage]) -> str:
        """What is asked for. The protocol is run as far as the point where it calls a model."""
        if not messages:
            return ""
        turns = to_turns(messages)
        if all(turn["role"] != "user" for turn in turns):  # what there is is asked for
            turns = [{**turn, "role": "user"} for turn in turns]
        flow = conversation(turns, self._rules)
        seen: list[Verdict] = []
        try:
            step = next(flow)
            while isinstance(step, Check):
                verdicts = self._guard.check_many(step.pairs)
                seen += verdicts
                step = flow.send(verdicts)
        except Blocked as blocked:
            self._tell(blocked.verdict)
            raise
        finally:
            flow.close()
        verdict = max(seen, key=lambda v: v.action.rank)
        self._tell(verdict)
        if not verdict.delivers:  # the protocol would have masked it
            raise Blocked(verdict)
        return asked(turns, self._rules.context_turns)

    def _tell(self, verdict: Verdict) -> None:
        if self._on_verdict is not None:
            self._on_verdict(verdict)


def _said(generation: Generation) -> str:
    if isinstance(generation, ChatGeneration) and isinstance(generation.message, AIMessage):
        return all_words(generation.message)
    return generation.text
