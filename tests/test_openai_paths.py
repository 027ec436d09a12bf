"""A call below a path of any spelling, with the real client, against a server that notes what it
is asked: none goes around the guard."""

from __future__ import annotations

import asyncio
import json
import posixpath
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import openai
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from loopback import serving
from openai import AsyncOpenAI, AzureOpenAI, OpenAI

from guardrail import Category, Guard, GuardrailError, Severity
from guardrail.openai import guard_openai
from guardrail.testing import FakeModerator

# Refused by the guard, so that no guarded call reaches the server: what it sees went around it.
BODY: Any = {
    "model": "m",
    "messages": [{"role": "user", "content": "bomb"}],
    "input": [{"role": "user", "content": "bomb"}],
}


class Notes(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.paths: list[str] = []
        self.host = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.host}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        assert isinstance(self.server, Notes)
        self.server.paths.append(self.path)
        body = json.dumps({"object": "list", "data": []}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_DELETE = do_POST  # noqa: N815 - names of http.server

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def the_notes() -> Iterator[Notes]:
    with serving(Notes()) as server:
        yield server


@pytest.fixture
def notes(the_notes: Notes) -> Notes:
    the_notes.paths.clear()
    return the_notes


@pytest.fixture(scope="module")
def client(the_notes: Notes) -> Iterator[OpenAI]:
    plain = OpenAI(base_url=the_notes.url, api_key="k", max_retries=0, timeout=20)
    with guard_openai(plain, make_guard()) as client:
        yield client


def make_guard() -> Guard:
    return Guard(FakeModerator({"bomb": (Severity.SEVERE, Category.VIOLENCE)}))


def generates(seen: str) -> bool:
    """Whether the most obliging of servers takes this path for an endpoint where a model speaks:
    it decodes as often as it can, cuts parameters, minds no slashes and no case."""
    path = seen.partition("?")[0]
    while (shorter := unquote(path)) != path:
        path = shorter
    segments = [s.partition(";")[0].strip() for s in path.replace("\\", "/").split("/")]
    path = posixpath.normpath("/" + "/".join(segments)).lower()
    return path.endswith(("/completions", "/responses"))


@pytest.mark.parametrize(
    "path",
    [
        "/models/../chat/completions",
        "models/../chat/completions",
        "/files/x/../../chat/completions",
        "/models/%2e%2e/chat/completions",
        "/models/.%2E/chat/completions",
        "/models/%252e%252e/chat/completions",
        "/models/..%2fchat/completions",
        "/models\\..\\chat\\completions",
        "/models/%5c..%5cchat/completions",
        "/models/..;a=b/chat/completions",
        "/models/./../chat/completions",
        "//models/chat/completions",
        "///chat/completions",
        "/models//../chat/completions",
        "/models/x/v1/chat/completions",
        "/models/x/../../chat/completions?a=/models",
        "/models/../chat/completions#/models",
        "models:/../chat/completions",
        "{host}/v1/chat/completions",
        "{host}/v1/models/../chat/completions",
        "/Chat/Completions",
        "/models/../responses",
    ],
)
@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_path_that_could_be_read_as_another_is_refused(
    notes: Notes, client: OpenAI, path: str, how: str
) -> None:
    path = path.format(host=notes.host)

    async def ask() -> None:
        plain = AsyncOpenAI(base_url=notes.url, api_key="k", max_retries=0, timeout=20)
        async with guard_openai(plain, make_guard()) as guarded:
            await guarded.post(path, cast_to=object, body=BODY)

    ways: Any = {
        "sync": lambda: client.post(path, cast_to=object, body=BODY),
        "async": lambda: asyncio.run(ask()),
    }
    with pytest.raises(GuardrailError, match=r"read as another one|is not guarded"):
        ways[how]()
    assert notes.paths == []


PARTS = st.sampled_from(
    ["models", "files", "chat", "completions", "responses", "Chat", "COMPLETIONS", ".", "..", "...",
     "..;x", "%2e%2e", "%2E.", "%252e%252e", "%2f", "%5c", "\\", "?", "#", "?a=", "x", "http:",
     "x:", "%63hat", "%00", "%0a..", "%20..", " ..", "v1", "127.0.0.1", ""]
)  # fmt: skip
PATHS = st.lists(st.tuples(st.sampled_from(["/", "/", "/", "\\", "%2f", ""]), PARTS), max_size=7)


@given(
    path=PATHS.map(lambda parts: "".join(slash + part for slash, part in parts)),
    start=st.sampled_from(["", "/models/", "/files/x", "models", "//models"]),
    method=st.sampled_from(["POST", "post", "DELETE"]),
)
@example(path="/../chat/completions", start="/models/", method="POST")
def test_no_spelling_of_a_path_goes_around_the_guard(
    the_notes: Notes, client: OpenAI, path: str, start: str, method: str
) -> None:
    the_notes.paths.clear()
    call = client.delete if method == "DELETE" else client.post
    with suppress(GuardrailError, openai.APIError):
        call(start + path, cast_to=object, body=BODY)
    assert method == "DELETE" or not any(map(generates, the_notes.paths))


@pytest.mark.parametrize("model", ["../../chat/completions?", "m/chat/completions?", "%2e%2e/x"])
def test_an_azure_deployment_is_no_path(notes: Notes, model: str) -> None:
    plain = AzureOpenAI(
        azure_endpoint=notes.host, api_version="1", api_key="k", max_retries=0, timeout=20
    )
    with guard_openai(plain, make_guard()) as client:
        for name in ("body", "extra"):
            given_ = {"model": model} if name == "body" else {"model": "m"}
            extra = {"extra_body": {"model": model}} if name == "extra" else {}
            with pytest.raises(GuardrailError, match="could be read as a path"):
                client.embeddings.create(input="x", **given_, **extra)
        client.embeddings.create(model="ada-002", input="x", encoding_format="float")
    assert len(notes.paths) == 1


def test_names_of_files_and_models_pass_as_they_are(notes: Notes, client: OpenAI) -> None:
    for name in ("gpt-4o", "ft:gpt-3.5-turbo:us::a1", "org/model", "a..b", "50%"):
        client.models.retrieve(name)
    client.models.list()
    client.get("/models/", cast_to=object)
    client.get("/organization/usage/completions", cast_to=object)
    client.delete("/chat/completions/x", cast_to=object)
    assert len(notes.paths) == 9


@pytest.mark.parametrize(
    "path",
    [
        "files/file-1/content",
        "files/file-1/Content;x=y",
        "files/file-1/%63ontent",
        "models/m/v1/files/file-1/content",
        "containers/c/files/f/content",
        "evals/e/runs/r/output_items",
        "evals/e/runs/r/output_items/i",
        "audio/transcriptions",
        "audio/translations",
    ],
)
@pytest.mark.parametrize("method", ["get", "post"])
def test_what_hands_out_a_models_text_is_refused(
    notes: Notes, client: OpenAI, path: str, method: str
) -> None:
    with pytest.raises(GuardrailError, match="call it on the client that was given to guard_op"):
        getattr(client, method)(f"/{path}", cast_to=object)
    assert notes.paths == []


def test_what_keeps_files_and_batches_passes(notes: Notes, client: OpenAI) -> None:
    client.files.list()
    client.files.retrieve("file-1")
    client.files.create(file=b"{}", purpose="batch")
    client.batches.create(
        completion_window="24h", endpoint="/v1/chat/completions", input_file_id="file-1"
    )
    client.batches.retrieve("b")
    client.containers.files.list("c")
    client.evals.runs.retrieve("r", eval_id="e")
    client.post("/audio/speech", cast_to=object, body={"input": "hi"})
    assert len(notes.paths) == 8
