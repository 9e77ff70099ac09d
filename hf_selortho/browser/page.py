"""The page: Gradio components around the HTML of the views, and the events between them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import gradio as gr

from ..errors import SelOrthoError
from ..features import Sampling
from .address import MAIN, MAX_CHARACTERS, VIEWS, Address, parse_address, view_of
from .catalog import card_markdown
from .endpoints import STEERING_LIMIT, add_endpoints
from .live_model import MAX_NEW_TOKENS
from .rendering import problem, render
from .steering_view import (
    DEFAULT_STRENGTH,
    EXAMPLE_PROMPT,
    MODES,
    OFFERED,
    Chosen,
    default_mode,
    offered,
    shown,
    steering_views,
    steers_of,
)
from .views import Views

_STATIC = files(__package__) / "static"
STYLE = (_STATIC / "page.css").read_text(encoding="utf-8")
SCRIPT = (_STATIC / "page.js").read_text(encoding="utf-8")
HEAD = f'<meta name="viewport" content="width=device-width, initial-scale=1"><script>{SCRIPT}</script>'
_CONNECT_ROUTER = 'window.selortho.connect((query) => { props.value = query; trigger("submit"); });'
_DONE = "() => window.selortho.done()"
_VISITORS_AT_ONCE = 16  # of the views, most of which wait for the language model at worst


def theme() -> gr.themes.Base:
    """Return a theme of the system's fonts, so that nothing is fetched from elsewhere."""
    sans = ["ui-sans-serif", "system-ui", "sans-serif"]
    return gr.themes.Soft(
        primary_hue="blue", neutral_hue="slate", font=sans, font_mono=["ui-monospace", "Consolas", "monospace"]
    )


class Page:
    """Builds the Blocks of the page around its views."""

    def __init__(self, views: Views) -> None:
        self.views, self.main = views, views.catalog[MAIN]
        self._shown: dict[str, gr.HTML] = {}  # by view, as the boxes whose text is `q` of the view's address
        self._boxes: dict[str, gr.Textbox] = {}

    def build(self) -> gr.Blocks:
        """Return the page with its events and named endpoints."""
        title = f"{self.main.title} · hf_selortho"
        with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as blocks:
            views = {name: words for name, words in VIEWS.items() if name != "graph" or self.views.graphs.files}
            gr.HTML(render("header.html", catalog=self.views.catalog, views=views), elem_id="so-header")
            router = gr.HTML("", js_on_load=_CONNECT_ROUTER, elem_id="so-router")
            for name in VIEWS:
                with gr.Column(elem_id=f"so-view-{name}", elem_classes="so-pane"):
                    if form := getattr(self, f"_{name}", None):
                        form()
                    self._shown[name] = gr.HTML(
                        "", elem_id=f"so-out-{name}", elem_classes="so-out", apply_default_css=False
                    )
                    if name == "run" and self.main.card:
                        with gr.Accordion("Model card", open=False):
                            gr.Markdown(card_markdown(self.main), elem_classes="so-model-card", sanitize_html=True)
            self._connect(blocks, router)
            add_endpoints(self.views)
        blocks.queue(max_size=128, default_concurrency_limit=_VISITORS_AT_ONCE)
        return blocks

    def _text(self) -> None:
        with gr.Row(elem_classes="so-inputs"):
            sentence = self._box("text", "Sentence", "Type a sentence, and see which features fire on each token", 5)
            read = _button("Read")
        _go("text", "(q)", "{q, token: '', feature: ''}", [sentence], [sentence.submit, read.click])

    def _feature(self) -> None:
        with gr.Row(elem_classes="so-inputs"):
            self._jump = gr.Number(label="Jump to feature", precision=0, minimum=0, scale=1, min_width=130)
            text = self._box("feature", "Try it on my text", "A sentence", 4)
            show = _button("Show")
        changes = "{id: id === null ? '' : String(id), q}"
        _go("feature", "(id, q)", changes, [self._jump, text], [self._jump.submit, text.submit, show.click])

    def _pairs(self) -> None:
        with gr.Row(elem_classes="so-inputs"):
            wanted = self._box("pairs", "Filter the table", "A feature's number, or a word of a label", 5)
            apply = _button("Filter")
        _go("pairs", "(q)", "{a: '', b: '', page: '', q}", [wanted], [wanted.submit, apply.click])

    def _search(self) -> None:
        choices = [("label", "label"), ("token that it promotes", "token"), ("phrase on which it fires", "phrase")]
        with gr.Row(elem_classes="so-inputs"):
            wanted = self._box("search", "Search", "import, or a phrase", 3)
            self._by = gr.Radio(choices, value="label", label="Features by", scale=3)
            search = _button("Search")
        changes = "{q, by: by === 'label' ? '' : by}"
        _go("search", "(q, by)", changes, [wanted, self._by], [wanted.submit, search.click, self._by.input])

    def _compare(self) -> None:
        with gr.Row(elem_classes="so-inputs"):
            boxes = [self._box("compare", "Sentence", "A sentence for both SAEs", 5)]
            if self.views.live.allow_other_saes:
                place = "owner/name[@revision][/subfolder]"
                boxes.append(gr.Textbox(label="Another SAE of the Hub", placeholder=place, scale=3))
            compare = _button("Compare")
        _go("compare", "(q, other)", "{q, other}", boxes, [*(box.submit for box in boxes), compare.click])

    def _steer(self) -> None:
        index = self.main.index
        example = offered(index)[0][1] if offered(index) else None
        with gr.Row(elem_classes="so-inputs"):
            prompt = gr.Textbox(EXAMPLE_PROMPT, label="Prompt", max_length=MAX_CHARACTERS, scale=3, min_width=240)
            a, b = self._feature_box("Feature", example), self._feature_box("And feature (optional)", None)
        with gr.Row(elem_classes="so-inputs"):
            value = gr.Number(DEFAULT_STRENGTH, label="Strength", min_width=90, scale=1, step=0.5)
            modes = [(words, mode) for mode, words in MODES.items()]
            mode = gr.Dropdown(modes, value=default_mode(index), label="Its activation becomes", min_width=170, scale=2)
            temperature = gr.Slider(0.0, 1.5, value=0.7, step=0.1, label="Temperature", scale=2, min_width=190)
            tokens = gr.Slider(5, MAX_NEW_TOKENS, value=30, step=1, label="New tokens", scale=2, min_width=190)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90, scale=1)
            self._generate = gr.Button("Generate", variant="primary", elem_id="so-generate", scale=1, min_width=120)
        sae = gr.State(MAIN)  # whose features these are
        self._addressed = [prompt, a, b, mode, value, sae]  # what an address may say
        self._sampling = [temperature, tokens, seed]
        for box in (a, b):
            options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            box.key_up(self.offer, sae, box, trigger_mode="multiple", **options)

    def _feature_box(self, label: str, chosen: int | None) -> gr.Dropdown:
        choices = offered(self.main.index)
        return gr.Dropdown(
            choices,
            value=chosen,
            label=label,
            allow_custom_value=True,
            min_width=180,
            scale=2,
            elem_classes="so-choose",
        )

    def offer(self, sae: str, typed: gr.KeyUpData) -> Any:
        """Return the features that a box lists for what was typed in it."""
        found: list[Any] = offered(self.views.catalog[sae].index, str(typed.input_value or ""))
        # Gradio's script fails where a list becomes shorter while it is open; empty entries are hidden by the style
        return gr.Dropdown(choices=found + [("", "")] * (OFFERED - len(found)))

    def _box(self, view: str, label: str, placeholder: str, scale: int) -> gr.Textbox:
        self._boxes[view] = gr.Textbox(
            label=label, placeholder=placeholder, max_length=MAX_CHARACTERS, scale=scale, elem_id=f"so-q-{view}"
        )
        return self._boxes[view]

    def _connect(self, blocks: gr.Blocks, router: gr.HTML) -> None:
        """Send an address to the server, which answers with HTML and the content of the boxes."""
        outputs = [*self._shown.values(), *self._boxes.values(), self._jump, self._by, *self._addressed]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        moved = router.submit(self.navigate, router, outputs, trigger_mode="always_last", **private)
        opened = blocks.load(self.navigate, router, outputs, js="() => window.location.search", **private)
        generated = self._generate.click(
            self.generate,
            [*self._addressed, *self._sampling],
            self._shown["steer"],
            trigger_mode="once",
            **STEERING_LIMIT,
            **private,
        )
        for event in (moved, opened, generated):
            event.then(fn=None, js=_DONE)

    def navigate(self, query: str | None) -> list[Any]:
        """Return what an address shows; the other views stay as they are."""
        try:
            address = parse_address(query or "")
            content = self.views.render(address)
        except SelOrthoError as error:
            address = Address(view=view_of(query or ""))
            content = problem(address, str(error))
        by = address.by if address.view == "search" and address.by in ("label", "token", "phrase") else gr.skip()
        return [
            *(content if name == address.view else gr.skip() for name in self._shown),
            *(address.q if name == address.view else gr.skip() for name in self._boxes),
            address.id if address.view == "feature" else gr.skip(),
            by,
            *self._steer_values(address),
        ]

    def _steer_values(self, address: Address) -> list[Any]:
        """Prompt, features, mode, value and SAE of an address; what the boxes hold where it says nothing."""
        if address.view != "steer" or (address.a is None and not address.q):
            return [gr.skip() for _ in self._addressed]
        sae = address.sae if address.sae in self.views.catalog else MAIN
        index = self.views.catalog[sae].index
        boxes = [
            gr.Dropdown(
                choices=[(shown(index, chosen), chosen)] if chosen is not None else offered(index), value=chosen
            )
            for chosen in (address.a, address.b)
        ]
        known = address.value is not None and address.mode in MODES
        mode, value = (address.mode, address.value) if known else (default_mode(index), DEFAULT_STRENGTH)
        return [address.q or gr.skip(), *boxes, mode, value, sae]

    def generate(
        self,
        prompt: str,
        a: Chosen,
        b: Chosen,
        mode: str,
        value: float,
        sae: str,
        temperature: float,
        tokens: float,
        seed: float,
    ) -> Iterator[str]:
        """Return the two texts of the steering view, as they grow."""
        address, index = Address(view="steer", q=prompt or "", sae=sae), self.views.catalog[sae].index
        try:
            steers = steers_of(index, [a, b], mode, value)
            sampling = Sampling(int(tokens), float(temperature), seed=int(seed or 0))
            first, second, *_ = [*(steer.feature for steer in steers), None, None]
            address = address.to(a=first, b=second, mode=mode, value=value)
        except SelOrthoError as error:
            yield problem(address, str(error))
        except (TypeError, ValueError, OverflowError):
            yield problem(address, "one of the numbers is missing: fill it in")
        else:
            yield from steering_views(self.views.live, index, address, steers, sampling)


def _button(verb: str) -> gr.Button:
    return gr.Button(verb, variant="primary", scale=1, min_width=100)


def _go(view: str, arguments: str, changes: str, inputs: list[Any], events: list[Any]) -> None:
    """Let events change the address in the browser: `changes` is an object of JavaScript, of the inputs' values."""
    gr.on(events, fn=None, inputs=inputs, js=f"{arguments} => window.selortho.set({changes}, '{view}')")
