"""`guard_openai`: the official `openai` client, guarded. Imports `openai` only when it is called.

    client = guard_openai(OpenAI())
    client.chat.completions.create(model="...", messages=[...], stream=True)

One choke point, the client's `request`, sees every call, whichever helper made it: `create`,
`parse`, `stream`, `post`, `with_options(...)`. `POST /chat/completions` and `POST /responses` (and
the reading and cancelling of a stored response) are guarded; calls that hold no answer of a chat
model (embeddings, models, images, speech, files and batches to keep, ...) pass; every other path
raises GuardrailError, and so do those that hand out what models wrote (`files.content`, where the
answers of a batch lie, the files of containers, samples of evaluations, transcriptions), a path
that could be read as another one (dot segments, a host, ...), raw responses and websockets, which
cannot be judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

from guardrail.conversation import Rules
from guardrail.errors import require
from guardrail.guard import Guard, as_guard
from guardrail.stream import StreamConfig

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

__all__ = ["guard_openai"]

Client = TypeVar("Client", bound="OpenAI | AsyncOpenAI")


def guard_openai(
    client: Client,
    guard: Guard | None = None,
    *,
    on_block: Literal["refuse", "raise"] = "refuse",
    context_turns: int = 4,
    stream_config: StreamConfig | None = None,
) -> Client:
    """A client of the same class as `client`, whose chat completions and responses are guarded.

    client: an `OpenAI` or `AsyncOpenAI`, or a subclass such as `AzureOpenAI`. It is not changed;
        both share its connections, so that closing one closes the other.
    guard: `Guard()` by default.
    on_block: `refuse` answers with a refusal text, `raise` raises Blocked.
    context_turns: how many recent user turns are judged together, as in `GuardedChat`.
    stream_config: how often a stream is judged.

    The input is judged before the API is called; a refused one makes no call. What comes back has
    the types of the `openai` package. A refusal is an answer: in a chat completion its
    `finish_reason` is `content_filter`, in a response `status` is `incomplete` and
    `incomplete_details.reason` is `content_filter`. The verdict JSON stands under `guardrail` (a
    `model_extra`): on a completion, a chunk that ends a choice, and a response the one on the
    input, on each choice and on a response's `guardrail_output` the one on the output.

    Each text field (content, refusal, what a server adds, such as `reasoning_content`) has a gate
    of its own, for each choice. Tool calls, reasoning items, and everything else that is no plain
    text are withheld until they are whole and all strings in them are judged; they are never
    redacted, but refused; citations of a response are left out instead. Items that cannot be read
    as text (an image, audio, an item of an unknown type) follow the policy's `on_error`.
    `regenerate` means refuse here. A turn that the API holds (`previous_response_id`,
    `conversation`) is not judged again.

    A stream of JSON that was asked for with a schema says its refusal in the `refusal` field or
    part, for the `stream` helpers parse the rest: `chat.completions.stream()` then raises
    `openai.ContentFilterFinishReasonError`, `responses.stream()` ends with `response.incomplete`.
    Around an answer, names and numbers alone go out; a text there is left out.

    A stream that is refused is cancelled, so that its usage is not known. Logprobs spell out
    unjudged text: asked for in a stream, they raise ValueError, and so do `top_logprobs` anywhere;
    a whole answer has those of the tokens of its text, where that is what the model said.
    `parse()` raises `openai.ContentFilterFinishReasonError` on a refusal, which holds no object to
    parse. Errors of the API are the ones of the `openai` package; an answer without the shape of
    its kind, which cannot be judged, is an UpstreamError. Raises TypeError for what is no
    client, MissingExtra without the package.
    """
    require("openai", extra="openai")
    from guardrail._openai_client import guarded

    if on_block not in ("refuse", "raise"):
        raise ValueError(f"on_block must be 'refuse' or 'raise', not {on_block!r}")
    if context_turns < 1:
        raise ValueError("context_turns must be 1 or more")
    guard = as_guard(guard)
    rules = Rules(guard.policy, stream_config or StreamConfig(), on_block, context_turns)
    made: Any = guarded(client, guard, rules)
    return made  # type: ignore[no-any-return]
