"""The demo page: chat with a guarded model, and inspect one text.

python -m demo.app [--host 127.0.0.1] [--port 7860]

Nothing is fetched from outside the page's own server, and nothing typed in is stored.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guardrail import Guard, GuardrailError, Moderator, OnnxModerator, Policy, Verdict
from guardrail.policy import PRESETS

from . import render
from .first_look import conversations
from .responder import EXAMPLES
from .turns import Connection, Turn, answer, transcript

__all__ = ["build", "launch", "main"]

# Whatever a model or a user writes (a Markdown image, say), the browser asks nobody else for it.
_CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "form-action 'self'"
)
_HEAD = (
    "<h1>guard<span>rail</span></h1>"
    "<p>Every message is judged before the model reads it, every answer before you do. "
    "On this machine, in milliseconds.</p>"
)
_TOGGLE_THEME = "() => { document.body.classList.toggle('dark'); }"
_WAITING = render.pair(
    render.empty("Your message", "Send one, or click an example."),
    render.empty("The answer", "Judged passage by passage, before it is shown."),
)


def build(moderator: Moderator, *, connect: bool = True) -> gr.Blocks:
    """The page over `moderator`.

    connect: offer to chat with an API whose URL the visitor gives; the server opens that URL, so
        only for a page that nobody else can reach.
    """
    guards = {name: Guard(moderator, name) for name in PRESETS}
    page = gr.Blocks(title="guardrail", analytics_enabled=False)
    with page:
        with gr.Row(elem_id="g-top"):
            gr.HTML(_HEAD, elem_id="g-head")
            theme = gr.Button("Light / dark", size="sm", min_width=110, scale=0)
            theme.click(None, js=_TOGGLE_THEME)
        with gr.Tab("Chat"):
            _chat(guards, connect)
        with gr.Tab("Inspect"):
            _inspect(guards)
    return page


def _chat(guards: dict[str, Guard], connect: bool) -> None:
    turns = gr.State([])
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            chat = gr.Chatbot(
                elem_id="g-chat",
                height=500,
                show_label=False,
                render_markdown=False,  # a reader sees exactly what the guard has judged
                buttons=[],  # they would copy, and share, the escaped texts
                feedback_options=None,
                placeholder="Say something, or click an example below.",
            )
            with gr.Row(elem_id="g-chips"):
                chips = [gr.Button(label, size="sm") for label, _ in EXAMPLES]
            with gr.Row():
                box = gr.Textbox(
                    placeholder="Message",
                    show_label=False,
                    container=False,
                    scale=5,
                    max_length=20_000,
                    elem_id="g-box",
                )
                send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="g-send")
            model = gr.HTML(render.model_line(Connection().name), elem_id="g-model")
        with gr.Column(scale=2, min_width=300):
            verdicts = gr.HTML(_WAITING, elem_id="g-verdicts")
            preset = gr.Radio(list(PRESETS), value="balanced", label="Policy", elem_id="g-preset")
            with gr.Accordion("What this policy does", open=False):
                grid = gr.HTML(render.policy_grid(guards["balanced"].policy), elem_id="g-grid")
            fields = _connection_fields(model) if connect else []

    def talk(
        event: gr.EventData, typed: str, before: list[Turn], policy: str, *given: str | None
    ) -> Iterator[Any]:
        text = prompts.get(event.target, typed or "")
        if not text.strip():
            yield "", before, transcript(before), _WAITING
            return
        cleared: Any = ""  # once: what is typed while the answer streams stays
        for turn in answer(text, before, guards[policy], _connection(*given)):
            now = [*before, turn]
            yield cleared, now, transcript(now), _cards(turn)
            cleared = gr.skip()

    def look_back(all_turns: list[Turn], event: gr.SelectData) -> str:
        return _cards(all_turns[int(event.index) // 2])

    prompts: dict[Any, str] = {
        chip: prompt for chip, (_, prompt) in zip(chips, EXAMPLES, strict=True)
    }
    outputs = [box, turns, chat, verdicts]
    inputs = [box, turns, preset, *fields]
    shared: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    # One event for all of them, so that nothing is sent while an answer is under way.
    triggers = [box.submit, send.click, *(chip.click for chip in chips)]
    gr.on(triggers, talk, inputs, outputs, trigger_mode="once", **shared)
    chat.select(look_back, turns, verdicts, **shared)
    chat.clear(lambda: ([], _WAITING), None, [turns, verdicts], **shared)
    preset.change(lambda name: render.policy_grid(Policy.load(name)), preset, grid, **shared)


def _connection_fields(model: gr.HTML) -> list[gr.Textbox]:
    with gr.Accordion("Chat model", open=False):
        url = gr.Textbox(
            label="URL of an OpenAI-compatible API",
            placeholder="http://127.0.0.1:11434/v1  (empty: the model named above)",
            elem_id="g-url",
        )
        with gr.Row():
            name = gr.Textbox(label="Model", placeholder="its name there", min_width=120)
            key = gr.Textbox(
                label="Key",
                type="password",
                placeholder="never stored",
                min_width=120,
            )
    # One event for both, and the last always counts: of two that run side by side, the one that
    # saw half of what was typed could end last, and its line would stay.
    gr.on(
        [url.change, name.change],
        lambda *given: render.model_line(_connection(*given).name),
        [url, name],
        model,
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )
    return [url, name, key]


def _connection(*given: str | None) -> Connection:
    """From the fields, any of them left empty."""
    return Connection(*((value or "").strip() for value in given))


def _cards(turn: Turn) -> str:
    """The two verdict cards of a turn."""
    result = turn.result
    if turn.error:
        return render.note(turn.error)
    if result is None:
        return render.pair(
            render.empty("Your message", "Let through." if turn.answer else "Judging…"),
            render.empty("The answer", "Each passage is judged before it is shown…"),
        )
    return render.pair(
        render.card("Your message", result.input_verdict),
        render.card("The answer", result.output_verdict)
        if result.output_verdict
        else render.empty("The answer", "The model was not asked."),
    )


def _inspect(guards: dict[str, Guard]) -> None:
    with gr.Row():
        prompt = gr.Textbox(label="Prompt", lines=3, max_lines=8, min_width=280, elem_id="g-prompt")
        response = gr.Textbox(
            label="Response (leave empty to judge the prompt)",
            lines=3,
            max_lines=8,
            min_width=280,
            elem_id="g-response",
        )
    go = gr.Button("Inspect", variant="primary", elem_id="g-go")
    given = conversations()
    examples = gr.Dataset(
        components=[prompt, response],
        samples=[[pair.prompt, pair.response or ""] for _, pair in given],
        sample_labels=[about for about, _ in given],
        show_label=False,
        samples_per_page=len(given),
        elem_id="g-examples",
    )
    report = gr.HTML(
        render.empty("Nothing judged yet", "Type a text, or click an example."),
        elem_id="g-report",
    )
    with gr.Accordion("Verdict as JSON (balanced)", open=False):
        raw = gr.JSON(show_label=False)

    def inspect(asked: str, answered: str) -> tuple[str, dict[str, Any] | None]:
        response = answered if answered.strip() else None
        text = response or asked
        if not text.strip():
            return render.empty("Nothing to judge", "Type a prompt, a response, or both."), None
        verdict = guards["balanced"].check(asked, response)
        return render.inspection(text, _under_each(guards, verdict)), verdict.to_json()

    shared: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
    outputs = [report, raw]
    gr.on([go.click, prompt.submit], inspect, [prompt, response], outputs, **shared)
    examples.click(
        lambda sample: (*sample, *inspect(*sample)),
        examples,
        [prompt, response, *outputs],
        **shared,
    )


def _under_each(guards: dict[str, Guard], verdict: Verdict) -> list[Verdict]:
    """What each policy makes of one assessment, which is made only once."""
    seen = verdict.assessment
    if seen is None:
        return [g.policy.fail(verdict.direction, verdict.error or "") for g in guards.values()]
    return [
        dataclasses.replace(
            guard.policy.decide(seen, guard.moderator.thresholds.get(seen.direction)),
            latency_ms=verdict.latency_ms,
        )
        for guard in guards.values()
    ]


def _theme() -> gr.themes.Base:
    """Fonts come from this server; colours keep WCAG AA contrast, light and dark."""
    # Bold for semibold: the semibold file that Gradio ships lacks the Latin letters.
    plex = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="lg",
        font=[plex, "ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_text_color="white",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_hover="*neutral_200",
    )


class _ContentPolicy:
    """ASGI middleware: the page's Content-Security-Policy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", _CONTENT_POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        await self._app(scope, receive, with_header)


def launch(page: gr.Blocks, host: str, port: int, *, block: bool = True) -> str:
    """Serve the page and return its URL; with `block`, until it is interrupted. OSError when the
    port is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    url: str
    _, url, _ = page.queue(default_concurrency_limit=4).launch(
        server_name=host,
        server_port=port,
        theme=_theme(),
        css_paths=Path(__file__).parent / "style.css",
        footer_links=[],
        run_history=False,  # it would keep every input in the browser, an API key among them
        enable_monitoring=False,
        ssr_mode=False,
        share=False,
        quiet=True,
        app_kwargs={"middleware": [Middleware(_ContentPolicy)]},
        prevent_thread_lock=True,
    )
    print(f"The demo page is at {url} (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return url


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.app", description="The demo page.")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on")
    parser.add_argument("--port", type=int, default=7860, help="port to serve on")
    args = parser.parse_args()
    try:
        page = build(OnnxModerator(), connect=args.host in ("127.0.0.1", "::1", "localhost"))
        launch(page, args.host, args.port)
    except GuardrailError as error:
        sys.exit(f"demo: {error}")
    except OSError as error:
        sys.exit(
            f"demo: cannot serve on {args.host}:{args.port} ({error}): is the port taken? "
            "Give another one: --port, or make run PORT=..."
        )


if __name__ == "__main__":
    main()
