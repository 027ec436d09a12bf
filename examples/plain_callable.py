"""Put a guard around any function that answers chat messages.

    python examples/plain_callable.py

Your model is `answer`: it may call whatever you like, and return a str or yield it in pieces.
"""

from collections.abc import Iterator

from guardrail import GuardedChat


def answer(messages: list[dict[str, str]]) -> Iterator[str]:
    """Stands for your model: streams its answer word by word."""
    for word in f"You said: {messages[-1]['content']} Thank you for asking!".split():
        yield word + " "


chat = GuardedChat(answer)  # the bundled model, the policy "balanced", fails closed

# All at once: the text that may be shown, and why.
result = chat.complete("Which bread is good with tomato soup?")
print("text:", result.text)
print("finish_reason:", result.finish_reason)
print("input verdict:", result.input_verdict.summary())
if result.output_verdict is not None:  # None when the question was refused already
    print("output verdict:", result.output_verdict.summary())

# Streamed: no character is printed before it was judged.
stream = chat.stream("And which cheese?")
print("stream: ", end="")
for text in stream:
    print(text, end="", flush=True)
print("\nblocked:", stream.result.blocked)
