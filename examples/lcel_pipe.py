"""Put a guard into a LangChain pipe (LCEL): around the model, or around a whole chain.

pip install -c constraints.txt '.[cpu,langchain]' && python examples/lcel_pipe.py
"""

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from guardrail import Guard
from guardrail.langchain import GuardedChatModel, GuardrailRunnable


def model():
    """Stands for your model, such as ChatOpenAI(model="..."); streams word by word."""
    return GenericFakeChatModel(messages=iter(["Boil the water, then let the tea stand."]))


guard = Guard()  # the bundled model, the policy "balanced", fails closed
prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")])
question = {"question": "How do I make tea?"}

# Around the model: it stays a chat model, so everything that takes one takes it.
pipe = prompt | GuardedChatModel(inner=model(), guard=guard) | StrOutputParser()
print("model: ", end="")
for text in pipe.stream(question):  # no character is printed before it was judged
    print(text, end="", flush=True)

# Around a chain: only what the user typed is judged as input, not what the prompt adds.
chain = GuardrailRunnable(prompt | model(), guard=guard, input_key="question")
answer = chain.invoke(question)
print("\nchain:", answer.content)
print("verdict:", answer.response_metadata["guardrail"]["action"])
