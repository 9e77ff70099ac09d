"""The page: Gradio components around the HTML of the views."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from .. import SelOrthoError
from ..features.render import escape
from ..features.sampling import Sampling
from . import parts, steer_page
from .address import VIEWS, Address, parse_address
from .cards import card_markdown
from .endpoints import add_endpoints
from .live import MAX_CHARACTERS, MAX_NEW_TOKENS, LiveModel
from .shelf import MAIN, Shown
from .views import Views

logger = logging.getLogger("hf_selortho.space")

_HERE = Path(__file__).parent
_ROUTER_JS = """
window.selortho.connect((query) => { props.value = query; trigger("submit"); });
"""
SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8")
STYLE = (_HERE / "page.css").read_text(encoding="utf-8")
HEAD = f'<meta name="viewport" content="width=device-width, initial-scale=1"><script>{SCRIPT}</script>'
VISITORS_AT_ONCE = 16  # of the views, most of which wait for the language model at worst


def theme() -> gr.themes.Base:
    """One theme: the system's fonts, so that nothing is fetched from elsewhere."""
    sans = ["ui-sans-serif", "system-ui", "sans-serif"]
    return gr.themes.Soft(
        primary_hue="blue", neutral_hue="slate", font=sans, font_mono=["ui-monospace", "Consolas", "monospace"]
    )


class Page:
    """Builds the Blocks of the page.

    Args:
        shelf: the SAEs by key. live: the language model. views: what is shown.
    """

    def __init__(self, shelf: dict[str, Shown], live: LiveModel, views: Views) -> None:
        self.shelf, self.live, self.views = shelf, live, views
        self._shown: dict[str, gr.HTML] = {}
        self._boxes: dict[str, gr.Textbox] = {}
        self._steering: dict[str, Any] = {}

    def build(self) -> gr.Blocks:
        """The page, its events and its named endpoints."""
        title = f"{self.shelf[MAIN].title} · hf_selortho"
        with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as blocks:
            gr.HTML(self._header(), elem_id="so-header")
            router = gr.HTML("", js_on_load=_ROUTER_JS, elem_id="so-router")
            for view in VIEWS:
                with gr.Column(elem_id=f"so-view-{view}", elem_classes="so-pane"):
                    getattr(self, f"_{view}")()
            self._connect(blocks, router)
            add_endpoints(self.shelf, self.live, self.views)
        blocks.queue(max_size=128, default_concurrency_limit=VISITORS_AT_ONCE)
        return blocks

    def _header(self) -> str:
        links = "".join(f'<a href="?view={view}" data-view="{view}">{name}</a>' for view, name in VIEWS.items())
        return (
            '<div class="so-top"><div class="so-brand"><strong>Features</strong> of '
            f"{escape(self.shelf[MAIN].title)}</div>"
            f'<nav id="so-nav" aria-label="views">{links}</nav>{self._switch()}</div>'
            '<div class="so-progress" aria-hidden="true"></div>'
        )

    def _switch(self) -> str:
        """Which of the SAEs is shown, where there are two."""
        if len(self.shelf) < 2:
            return ""
        buttons = "".join(
            f'<button type="button" data-set="sae={"" if key == MAIN else key}" title="{escape(shown.title)}">'
            f"{'this SAE' if key == MAIN else 'its twin'}</button>"
            for key, shown in self.shelf.items()
        )
        return f'<div class="so-switch" role="group" aria-label="which SAE is shown">{buttons}</div>'

    def _text(self) -> None:
        self._ask("text", "Sentence", "Type a sentence, and see which features fire on each token", "Read")

    def _feature(self) -> None:
        with gr.Row(elem_classes="so-inputs"):
            number = gr.Number(label="Jump to feature", precision=0, minimum=0, scale=1, min_width=130)
            self._ask_box("feature", "Try it on my text", "A sentence", scale=4)
            go = gr.Button("Show", variant="primary", scale=1, min_width=100)
        self._jump = number
        js = "(id, q) => window.selortho.set({id: id === null ? '' : String(id), q}, 'feature')"
        for event in (number.submit, self._boxes["feature"].submit, go.click):
            event(fn=None, inputs=[number, self._boxes["feature"]], js=js)
        self._answer("feature")

    def _pairs(self) -> None:
        self._ask(
            "pairs",
            "Filter the table",
            "A feature's number, or a word of a label",
            "Filter",
            "{a: '', b: '', page: '', q}",
        )

    def _search(self) -> None:
        choices = [("label", "label"), ("token that it promotes", "token"), ("phrase on which it fires", "phrase")]
        with gr.Row(elem_classes="so-inputs"):
            self._ask_box("search", "Search", "import, or a phrase", scale=3)
            self._by = gr.Radio(choices, value="label", label="Features by", scale=3)
            go = gr.Button("Search", variant="primary", scale=1, min_width=100)
        js = "(q, by) => window.selortho.set({q, by: by === 'label' ? '' : by}, 'search')"
        for event in (self._boxes["search"].submit, go.click, self._by.input):
            event(fn=None, inputs=[self._boxes["search"], self._by], js=js)
        self._answer("search")

    def _compare(self) -> None:
        if not self.views.allow_other_saes:
            self._ask("compare", "Sentence", "A sentence for both SAEs", "Compare")
            return
        with gr.Row(elem_classes="so-inputs"):
            self._ask_box("compare", "Sentence", "A sentence for both SAEs", scale=3)
            other = gr.Textbox(label="Another SAE of the Hub", placeholder="owner/name[@revision][/subfolder]", scale=2)
            go = gr.Button("Compare", variant="primary", scale=1, min_width=100)
        js = "(q, other) => window.selortho.set({q, other}, 'compare')"
        for event in (self._boxes["compare"].submit, other.submit, go.click):
            event(fn=None, inputs=[self._boxes["compare"], other], js=js)
        self._answer("compare")

    def _run(self) -> None:
        self._answer("run")
        shown = self.shelf[MAIN]
        if shown.card:
            with gr.Accordion("Model card", open=False):
                gr.Markdown(card_markdown(shown), elem_classes="so-model-card", sanitize_html=True)

    def _steer(self) -> None:
        self._steering = self._steer_controls()
        self._generate = gr.Button("Generate", variant="primary", elem_id="so-generate")
        self._answer("steer")

    def _steer_inputs(self) -> list[Any]:
        return list(self._steering.values())

    def _steer_controls(self) -> dict[str, Any]:
        with gr.Row(elem_classes="so-inputs"):
            prompt = gr.Textbox(
                label="Prompt", placeholder="The weather today", max_length=MAX_CHARACTERS, lines=2, scale=3
            )
            a = gr.Number(label="Feature", precision=0, minimum=0, min_width=110, scale=1)
            b = gr.Number(label="And feature (optional)", precision=0, minimum=0, min_width=110, scale=1)
        with gr.Row(elem_classes="so-inputs so-even"):
            modes = [("hold at a value", "clamp"), ("multiply", "scale")]
            mode = gr.Radio(modes, value="clamp", label="Its activation", scale=2)
            value = gr.Number(label="Value", value=5.0, min_width=110, scale=1)
            temperature = gr.Slider(0.0, 1.5, value=0.7, step=0.1, label="Temperature", scale=2)
            tokens = gr.Slider(5, MAX_NEW_TOKENS, value=30, step=1, label="New tokens", scale=2)
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=90, scale=1)
        return {
            "prompt": prompt, "a": a, "b": b, "mode": mode, "value": value, "temperature": temperature,
            "tokens": tokens, "seed": seed,
        }  # fmt: skip

    def _ask(
        self, view: str, label: str, placeholder: str, verb: str, changes: str = "{q, token: '', feature: ''}"
    ) -> None:
        """A text box whose text becomes `q` of the view's address, and the view below."""
        with gr.Row(elem_classes="so-inputs"):
            self._ask_box(view, label, placeholder, scale=5)
            go = gr.Button(verb, variant="primary", scale=1, min_width=100)
        js = f"(q) => window.selortho.set({changes}, '{view}')"
        for event in (self._boxes[view].submit, go.click):
            event(fn=None, inputs=self._boxes[view], js=js)
        self._answer(view)

    def _ask_box(self, view: str, label: str, placeholder: str, scale: int) -> None:
        self._boxes[view] = gr.Textbox(
            label=label, placeholder=placeholder, max_length=MAX_CHARACTERS, scale=scale, elem_id=f"so-q-{view}"
        )

    def _answer(self, view: str) -> None:
        self._shown[view] = gr.HTML("", elem_id=f"so-out-{view}", elem_classes="so-out", apply_default_css=False)

    def _connect(self, blocks: gr.Blocks, router: gr.HTML) -> None:
        """The events: an address goes to the server, and comes back as HTML and as the content of the boxes."""
        outputs = [
            *self._shown.values(), *self._boxes.values(), self._jump, self._by, *self._steer_inputs(),
        ]  # fmt: skip
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        done = "() => window.selortho.done()"
        go = router.submit(self.navigate, router, outputs, trigger_mode="always_last", **private)
        go.then(fn=None, js=done)
        first = blocks.load(self.navigate, router, outputs, js="() => window.location.search", **private)
        first.then(fn=None, js=done)
        run = self._generate.click(
            self.write_both, self._steer_inputs(), self._shown["steer"], concurrency_id="steer", concurrency_limit=4,
            trigger_mode="once", **private,
        )  # fmt: skip
        run.then(fn=None, js=done)

    def navigate(self, query: str | None) -> list[Any]:
        """What an address shows; the other views stay as they are."""
        try:
            address = parse_address(query or "")
        except SelOrthoError as error:
            address = Address()
            content = parts.problem(address, str(error))
        else:
            content = steer_page.blank(address) if address.view == "steer" else _safely(self.views.render, address)
        shown = [content if view == address.view else gr.skip() for view in self._shown]
        boxes = [address.q if view == address.view else gr.skip() for view in self._boxes]
        jump = address.id if address.view == "feature" else gr.skip()
        by = address.by if address.view == "search" and address.by in ("label", "token", "phrase") else gr.skip()
        return [*shown, *boxes, jump, by, *self._steer_values(address)]

    def _steer_values(self, address: Address) -> list[Any]:
        if address.view != "steer":
            return [gr.skip() for _ in self._steering]
        value = address.value
        if value is None and address.a is not None:
            index = self.shelf[MAIN].index
            known = index is not None and 0 <= address.a < len(index)
            value = round(index.summary(address.a).max_activation, 2) if known and index is not None else None
        known_values = {
            "prompt": address.q or gr.skip(), "a": address.a, "b": address.b,
            "mode": address.mode if address.mode in ("clamp", "scale") else "clamp",
            "value": gr.skip() if value is None else value,
        }  # fmt: skip
        return [known_values.get(name, gr.skip()) for name in self._steering]

    def write_both(
        self, prompt: str, a: float | None, b: float | None, mode: str, value: float, temperature: float, tokens: float,
        seed: float,
    ) -> Iterator[str]:  # fmt: skip
        """The two texts of the steering view, as they grow."""
        address = Address(view="steer", q=prompt or "", mode=mode if mode in ("clamp", "scale") else "clamp")
        try:
            steers = steer_page.steers_of([a, b], mode, value)
            address = address.to(a=_whole(a), b=_whole(b), value=value)
            sampling = Sampling(int(tokens), float(temperature), seed=int(seed or 0))
        except (SelOrthoError, TypeError, ValueError, OverflowError) as error:
            words = str(error) if isinstance(error, SelOrthoError) else "one of the numbers is missing: fill it in"
            yield parts.problem(address, words)
            return
        yield from steer_page.steered_pages(self.live, address, steers, sampling)


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def _safely(render: Callable[[Address], str], address: Address) -> str:
    """A view, or a word that it failed; what failed is in the log, and nothing of it on the page."""
    try:
        return render(address)
    except Exception:
        logger.exception("view %s", address.view)
        return parts.problem(address, "Something went wrong here; the log of the page says what. Try another view.")
