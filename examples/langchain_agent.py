"""Put a guard around the model of a LangChain agent.

    pip install -c constraints.txt '.[cpu,langchain]' && python examples/langchain_agent.py

No stream mode of the agent shows a token that was not judged; a harmful tool call is never run.
"""

from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

from guardrail import Guard
from guardrail.langchain import GuardrailMiddleware


class Scripted(GenericFakeChatModel):
    """Stands for your model, such as ChatOpenAI(model="..."): says what it was given."""

    def bind_tools(self, tools, **kwargs):
        return self.bind(**kwargs)


def weather(city: str) -> str:
    """The weather in a city."""
    return f"Sunny in {city}"


call = {"name": "weather", "args": {"city": "Lyon"}, "id": "call-1"}
model = Scripted(
    messages=iter([AIMessage("", tool_calls=[call]), AIMessage("It is sunny in Lyon today.")])
)

# The bundled model, the policy "balanced". Put the guard last in the list of middleware.
agent = create_agent(model, [weather], middleware=[GuardrailMiddleware(guard=Guard())])

question = {"messages": [{"role": "user", "content": "How is the weather in Lyon?"}]}
for update in agent.stream(question, stream_mode="updates"):
    for node, state in update.items():
        message = state["messages"][-1]
        print(f"{node}: {message.text or [c['name'] for c in message.tool_calls]}")

# Every answer carries its verdict; a block is an answer with finish_reason "content_filter".
print("verdict:", message.response_metadata["guardrail"]["action"])
print("blocked:", message.response_metadata.get("finish_reason") == "content_filter")
