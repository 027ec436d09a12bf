"""A FastAPI app that streams a guarded answer: no unjudged character leaves the server.

    uvicorn examples.fastapi_stream:app
    curl -N localhost:8000/chat -H 'content-type: application/json' -d '{"text": "Hello"}'

Run as a program it serves itself on a free port, asks itself once, and ends.
"""

import asyncio
from collections.abc import AsyncIterator

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from guardrail import GuardedChat


async def model(messages: list[dict[str, str]]) -> AsyncIterator[str]:
    """Put your model here; this one repeats what it hears."""
    for word in f"You said: {messages[-1]['content']}".split(" "):
        yield f"{word} "


class Question(BaseModel):
    text: str


app = FastAPI()
chat = GuardedChat(model)


@app.post("/chat")
async def answer(question: Question) -> StreamingResponse:
    # When the browser goes away, the response is cancelled, and the model with it.
    return StreamingResponse(chat.astream(question.text), media_type="text/plain; charset=utf-8")


async def main() -> None:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    question = {"text": "Which bread is good with tomato soup?"}
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", f"http://127.0.0.1:{port}/chat", json=question) as response,
    ):
        print("status:", response.status_code)
        print("answer: ", end="")
        async for text in response.aiter_text():
            print(text, end="", flush=True)
        print()
    server.should_exit = True
    await serving


if __name__ == "__main__":
    asyncio.run(main())
