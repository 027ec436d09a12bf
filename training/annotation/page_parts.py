"""The components of the annotation page and where they stand; what they do is `page`'s."""

from __future__ import annotations

import gradio as gr

from guardrail.taxonomy import Category, Severity
from training.annotation import page_html as show


class Parts:
    """Made within a `gr.Blocks`."""

    def __init__(self) -> None:
        # Hidden, not gr.State: a State lives in the server, and dies with it.
        self.identity = gr.Textbox(visible="hidden", elem_id="a-identity")
        self.turn = gr.Textbox(visible="hidden", elem_id="a-turn")
        self.draft = gr.Textbox(visible="hidden", elem_id="a-draft")
        with gr.Column(visible=False) as self.door:
            self._door()
        with gr.Column(visible=False) as self.desk:
            self._desk()

    def _door(self) -> None:
        gr.Markdown("## Annotation\nSign in with the name and the key you were given.")
        self.name = gr.Textbox(label="Name", elem_id="a-name", max_length=200)
        self.key = gr.Textbox(label="Key", type="password", elem_id="a-key", max_length=200)
        self.enter = gr.Button("Sign in", variant="primary", elem_id="a-enter")
        self.refused = gr.HTML(elem_id="a-refused")

    def _desk(self) -> None:
        with gr.Row():
            self.progress = gr.HTML(elem_id="a-progress")
            self.settling = gr.Checkbox(
                label="Settle disagreements", visible=False, elem_id="a-settling", min_width=200,
                container=False,
            )  # fmt: skip
            self.leave = gr.Button("Sign out", size="sm", scale=0, elem_id="a-leave")
        with gr.Row(visible=False) as self.rest:
            self.why_rest = gr.HTML(elem_id="a-rest")
            self.rested = gr.Button("I had a break", size="sm", scale=0, elem_id="a-rested")
        with gr.Row():
            with gr.Column(scale=3, min_width=360):
                self.texts = gr.HTML(elem_id="a-texts")
                self.dispute = gr.HTML(elem_id="a-dispute")
                self.again = gr.Button("Look again", visible=False, elem_id="a-again")
                with gr.Accordion("Guideline", open=False):
                    gr.Markdown(show.general_guideline())
            with gr.Column(scale=2, min_width=340, visible=False) as self.form:
                self._stage_1()
                self._stage_2()
                self.note = gr.Textbox(
                    label="Note (optional)", max_lines=3, max_length=2000, elem_id="a-note"
                )
                with gr.Row():
                    self.save = gr.Button("Save", variant="primary", elem_id="a-save")
                    self.skip = gr.Button("Skip", elem_id="a-skip")
        with gr.Row():
            self.said = gr.HTML(elem_id="a-said")
            self.undo = gr.Button("Undo", size="sm", scale=0, elem_id="a-undo")
        self.shortcuts = gr.HTML(elem_id="a-shortcuts")

    def _stage_1(self) -> None:
        of_category, of_severity = show.guidelines()
        with gr.Column(visible=False, elem_id="a-item") as self.item:
            self.safe = gr.Radio(["Safe", "Unsafe"], label="Safe?", elem_id="a-safe")
            self.suggest = gr.Button("Show the suggestion", size="sm", elem_id="a-suggest")
            self.suggestion = gr.HTML(elem_id="a-suggestion")
            self.severity = gr.Radio(
                [
                    (f"{level.label}: {of_severity[level]}", int(level))
                    for level in Severity
                    if level
                ],
                label="Severity, of an unsafe text",
                elem_id="a-severity",
            )
            self.categories = gr.CheckboxGroup(
                [(f"{one} [{show.KEYS[one]}]: {of_category[one]}", one.value) for one in Category],
                label="Categories, of an unsafe text",
                elem_id="a-categories",
            )

    def _stage_2(self) -> None:
        sides = [("Left", "left"), ("Tie", "tie"), ("Right", "right")]
        with gr.Column(visible=False, elem_id="a-pair") as self.pair:
            self.questions = {
                name: gr.Radio(sides, label=text, elem_id=f"a-{name}")
                for name, text in show.QUESTIONS.items()
            }
