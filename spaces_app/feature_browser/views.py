"""The views of the page: an address in, HTML out."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from hf_selortho import SelOrthoError
from hf_selortho.features.index import FeatureIndex
from hf_selortho.features.records import PAIR_CLASSES, PairRecord
from hf_selortho.features.render import curves_html, escape, label_html, number, percent

from . import parts
from .address import Address
from .live import LiveModel, NotLiveError
from .readings import compared, read_text, shaded_text
from .run_page import run_page
from .shelf import Shown

PAIRS_ON_A_PAGE = 50
# What the table of pairs can be sorted by: the column, its heading and what it means.
PAIR_COLUMNS = {
    "score": ("trained", "score of the last selection of the training"),
    "correlation": ("now", "correlation on the text of the index"),
    "twin_correlation": ("twin", "correlation of the nearest features of the twin, trained without the penalty"),
    "decoder_cosine": ("cosine", "cosine of the decoder directions"),
    "support": ("both fire", "tokens on which both fire"),
}
CLASSES_IN_WORDS = {
    "duplicate": "fire together both ways and point alike",
    "nested": "one fires nearly only where the other does",
    "co-occurring": "fire together, for another reason",
    "unmeasured": "too rare on this text",
}


class Views:
    """Renders every view; holds nothing of any visitor.

    Args:
        shelf: the SAEs by key. live: the language model. examples: sentences to start with.
        allow_other_saes: whether visitors may compare with any SAE of the Hub.
    """

    def __init__(
        self, shelf: Mapping[str, Shown], live: LiveModel, examples: tuple[str, ...], allow_other_saes: bool = False
    ) -> None:
        self.shelf, self.live, self.examples, self.allow_other_saes = shelf, live, examples, allow_other_saes
        self._by_view: dict[str, Callable[[Address], str]] = {
            "text": self.text,
            "feature": self.feature,
            "pairs": self.pairs,
            "search": self.search,
            "compare": self.compare,
            "run": self.run,
        }

    def render(self, address: Address) -> str:
        """The view of an address; mistakes and what is missing are said in words."""
        try:
            return self._by_view[address.view](address)
        except SelOrthoError as error:
            return parts.problem(address, str(error))

    def shown(self, address: Address) -> Shown:
        """The SAE of an address.

        Raises:
            SelOrthoError: it is not on this page.
        """
        if address.sae not in self.shelf:
            raise SelOrthoError(f"sae={address.sae!r:.50}: this page shows {' and '.join(self.shelf)}")
        return self.shelf[address.sae]

    def index(self, address: Address) -> FeatureIndex:
        """Its feature index.

        Raises:
            SelOrthoError: it has none.
        """
        shown = self.shown(address)
        if shown.index is None:
            raise SelOrthoError(
                f"{shown.title} has no feature index, so only live text is shown: build one with "
                "scripts/build_feature_index.py"
            )
        return shown.index

    def text(self, address: Address) -> str:
        """Type a sentence, see what fires on each token."""
        shown = self.shown(address)
        if not address.q.strip():
            return parts.section(address, "Text", self._invitation(address))
        try:
            reading = self.live.capture(address.q, shown.key)
        except NotLiveError as error:
            return parts.section(
                address, "Text", parts.note(f"{error}. Features and pairs can be browsed all the same.")
            )
        return parts.section(address, f"Text: {address.q[:40]}", read_text(address, shown, reading))

    def feature(self, address: Address) -> str:
        """All about a feature."""
        index = self.index(address)
        if address.id is None:
            return parts.section(address, "Features", self._feature_list(address, index))
        record = index.feature(address.id)
        title = f"Feature {record.feature}"
        hand = " <span class='so-tag'>labelled by hand</span>" if record.label_source == "file" else ""
        body = (
            f'<header class="so-head"><h2>{title} <span class="so-label">{label_html(record.label)}</span>{hand}</h2>'
            f"{self._steps(address, index)}</header>{parts.frequency_facts(record)}"
            f'<div class="so-cols">{parts.histogram(record)}{parts.effects("Promotes", record.promoted)}'
            f"{parts.effects('Suppresses', record.suppressed)}</div>"
            f"{self._on_my_text(address, record.max_activation)}"
            f'<div class="so-cols">'
            f"{parts.neighbours(address.sae, index, 'Nearest by decoder cosine', record.nearest_by_cosine)}"
            f"{parts.neighbours(address.sae, index, 'Nearest by correlation', record.nearest_by_correlation)}</div>"
            f"{self._pairs_of(address, index, record.feature)}{parts.contexts(record)}"
        )
        return parts.section(address, title, body)

    def pairs(self, address: Address) -> str:
        """The pairs that the penalty acted on, or one of them."""
        index = self.index(address)
        if address.a is not None and address.b is not None:
            return self._pair(address, index, index.pair(address.a, address.b))
        return parts.section(address, "Pairs", self._pair_table(address, index))

    def search(self, address: Address) -> str:
        """Features by label, by a token that they promote, or by a phrase on which they fire."""
        index = self.index(address)
        if not address.q.strip():
            return parts.section(
                address, "Search", parts.note("Search features by their label, by a token, or by a phrase.")
            )
        if address.by == "phrase":
            try:
                reading = self.live.capture(address.q, address.sae)
            except NotLiveError as error:
                return parts.section(address, "Search", parts.note(str(error)))
            found = [index.summary(feature) for feature, _ in reading.strongest(30)]
            caption = f"Features that fire on “{address.q}”, the strongest first"
        elif address.by == "token":
            found = index.search_promoted(address.q)
            caption = f"Features that promote “{address.q.strip()}”"
        else:
            found = index.search_labels(address.q)
            caption = f"Features with “{address.q.strip()}” in their label"
        if not found:
            return parts.section(address, "Search", parts.note(f"No feature found: {caption.lower()}."))
        return parts.section(address, f"Search: {address.q[:40]}", parts.summaries(address.sae, found, caption))

    def compare(self, address: Address) -> str:
        """Two SAEs on one sentence."""
        keys = list(self.shelf)
        if address.other:
            keys = [keys[0], address.other]
        if len(keys) < 2:
            more = " Name another one of the Hub above." if self.allow_other_saes else ""
            words = "There is one SAE on this page; with its twin (--twin) beside it, both can be compared." + more
            return parts.section(address, "Compare", parts.note(words))
        if not address.q.strip():
            return parts.section(address, "Compare", self._invitation(address))
        try:
            readings = [self.live.capture(address.q, key) for key in keys[:2]]
        except NotLiveError as error:
            return parts.section(address, "Compare", parts.note(str(error)))
        saes = [self.live.sae(key) for key in keys[:2]]
        body = compared(address, [(key, self.shelf.get(key)) for key in keys[:2]], readings, saes)
        return parts.section(address, f"Compare: {address.q[:40]}", body)

    def run(self, address: Address) -> str:
        """What was measured in and after the training."""
        shown = self.shown(address)
        twin = next((other for key, other in self.shelf.items() if key != shown.key), None)
        return parts.section(address, "Run", run_page(shown, twin))

    def _invitation(self, address: Address) -> str:
        links = "".join(
            f"<li>{parts.link(address.to(q=text), escape(text), 'so-example')}</li>" for text in self.examples
        )
        return (
            f'<p class="so-note">Type a sentence above, or take one of these:</p><ul class="so-examples">{links}</ul>'
        )

    def _feature_list(self, address: Address, index: FeatureIndex) -> str:
        firing = index.firing_features()
        words = f"{len(index):,} features, of which {len(firing):,} fire on the text of the index. The most frequent:"
        most = sorted((index.summary(f) for f in firing), key=lambda s: (-s.frequency, s.feature))[:50]
        return parts.note(words) + parts.summaries(address.sae, most, "The most frequent features")

    def _steps(self, address: Address, index: FeatureIndex) -> str:
        number_, firing = address.id or 0, index.firing_features()
        before = next((f for f in reversed(firing) if f < number_), None)
        after = next((f for f in firing if f > number_), None)
        steps = [("‹ previous", before), ("next ›", after), ("random", random.choice(firing) if firing else None)]
        links = [
            parts.link(address.to(id=target), name, "so-button")
            for name, target in steps
            if target is not None and target != number_
        ]
        steer = parts.link(Address(view="steer", sae=address.sae, a=number_), "steer with it", "so-button")
        return f'<nav class="so-steps" aria-label="other features">{"".join(links)}{steer}</nav>'

    def _on_my_text(self, address: Address, scale: float) -> str:
        if not address.q.strip() or address.id is None:
            return ""
        try:
            reading = self.live.capture(address.q, address.sae)
        except SelOrthoError as error:
            return parts.note(str(error))
        return f"<h4>On your text</h4>{shaded_text(reading, address.id, scale)}"

    def _pairs_of(self, address: Address, index: FeatureIndex, feature: int) -> str:
        found = index.pairs_of(feature)[:20]
        if not found:
            return ""
        links = "".join(
            parts.link(Address(view="pairs", sae=address.sae, a=a, b=b), f"{a} – {b}", "so-button") for a, b in found
        )
        return f'<h4>Pairs that it is in</h4><nav class="so-steps" aria-label="pairs">{links}</nav>'

    def _pair_table(self, address: Address, index: FeatureIndex) -> str:
        address = address.to(sort=sort_column(index, address.sort))
        rows = sorted_pairs(index, address)
        pages = max(1, -(-len(rows) // PAIRS_ON_A_PAGE))
        page = min(max(address.page, 1), pages)
        shown = rows[(page - 1) * PAIRS_ON_A_PAGE : page * PAIRS_ON_A_PAGE]
        heads = ["pair", "class", *(self._sort_head(address, name) for name in PAIR_COLUMNS)]
        cells = [
            [
                parts.link(
                    Address(view="pairs", sae=address.sae, a=row["a"], b=row["b"]),
                    f'<span class="so-id">{row["a"]} – {row["b"]}</span> {label_html(index.label(row["a"]))} · '
                    f"{label_html(index.label(row['b']))}",
                    "so-feature",
                ),
                f'<span class="so-class so-{escape(row["pair_class"])}">{escape(row["pair_class"])}</span>',
                *(f"{row[name]:,}" if name == "support" else number(row[name], 2) for name in PAIR_COLUMNS),
            ]
            for row in shown
        ]
        turn = [
            parts.link(address.to(page=target), name, "so-button")
            for name, target in (("‹ page before", page - 1), ("next page ›", page + 1))
            if 1 <= target <= pages
        ]
        return (
            self._about_pairs(index) + self._class_filter(address, index)
            + parts.table(heads, cells, f"{len(rows):,} pairs, page {page} of {pages}", "so-pairs")
            + f'<nav class="so-steps" aria-label="pages">{"".join(turn)}</nav>'
        )  # fmt: skip

    def _about_pairs(self, index: FeatureIndex) -> str:
        about = index.facts["pairs"]
        if about.get("source") == "training":
            words = (
                f"The {index.pairs:,} strongest of the {about.get('selected', 0):,} pairs that the penalty acted on at "
                f"step {about.get('step')}, the last selection of the training."
            )
        else:
            words = (
                f"No selection of a training is known for this SAE: these are the {index.pairs:,} most correlated "
                "pairs on the text of the index."
            )
        rule = "".join(
            f"<li>{escape(part.strip())}</li>" for part in str(about.get("rule", "")).split(";") if part.strip()
        )
        how = f"<details><summary>How the classes are told apart</summary><ul>{rule}</ul></details>" if rule else ""
        return f"{parts.note(words)}{how}"

    def _class_filter(self, address: Address, index: FeatureIndex) -> str:
        counts = index.facts["pairs"].get("classes") or {}
        chips = [("", "all")] + [(name, f"{name} ({counts.get(name, 0):,})") for name in PAIR_CLASSES]
        links = "".join(
            f'<a href="{escape(address.to(only=value, page=1).query())}" class="so-button" '
            f"{'aria-current=true ' if value == address.only else ''}"
            f'title="{escape(CLASSES_IN_WORDS.get(value, ""))}">'
            f"{escape(name)}</a>"
            for value, name in chips
        )
        return f'<nav class="so-steps" aria-label="classes">{links}</nav>'

    def _sort_head(self, address: Address, name: str) -> str:
        title, meaning = PAIR_COLUMNS[name]
        own = address.sort == name
        arrow = (" ▲" if address.up else " ▼") if own else ""
        target = address.to(sort=name, up=own and not address.up, page=1)
        return f'<a href="{escape(target.query())}" title="{escape(meaning)}; click to sort">{title}{arrow}</a>'

    def _pair(self, address: Address, index: FeatureIndex, pair: PairRecord) -> str:
        labels = [index.label(pair.a), index.label(pair.b)]
        sides = (index.feature(pair.a), index.feature(pair.b))
        scales = (sides[0].max_activation, sides[1].max_activation)
        steer = Address(view="steer", sae=address.sae, a=pair.a, b=pair.b)
        head = (
            f'<header class="so-head"><h2>Pair <span class="so-key so-a">A {pair.a}</span> '
            f'{label_html(labels[0])} · <span class="so-key so-b">B {pair.b}</span> {label_html(labels[1])}</h2>'
            f'<nav class="so-steps">{parts.link(Address(view="pairs", sae=address.sae), "‹ all pairs", "so-button")}'
            f"{parts.link(steer, 'steer with both', 'so-button')}</nav></header>"
        )
        contexts = "".join(
            f"<h4>{title}</h4>{parts.joint_contexts([c for c in pair.contexts if c.kind == kind], scales)}"
            for kind, title in (("both", "Both fire"), ("a", "Only A fires"), ("b", "Only B fires"))
        )
        cards = "".join(f"<div>{parts.feature_card(address.sae, index, f.feature)}</div>" for f in sides)
        legend = (
            '<p class="so-legend"><span class="so-tok so-two" style="--s:.8">background: A</span> '
            '<span class="so-tok so-two" style="--b:.8">line below: B</span></p>'
        )
        body = (
            f"{head}{self._pair_facts(pair)}{self._pair_history(pair)}"
            f'<div class="so-cols">{cards}</div>{legend}{contexts}'
        )
        return parts.section(address.to(a=pair.a, b=pair.b), f"Pair {pair.a}, {pair.b}", body)

    def _pair_facts(self, pair: PairRecord) -> str:
        twin = "–"
        if pair.twin_correlation is not None and "twin" in self.shelf:
            same = " (the same one)" if pair.twin_a == pair.twin_b else ""
            twin = (
                f"{number(pair.twin_correlation)} <small>between its features {pair.twin_a} and {pair.twin_b}{same}, "
                f"whose directions have cosines of {number(pair.twin_match_a, 2)} and {number(pair.twin_match_b, 2)} "
                "with these</small>"
            )
        return parts.facts(
            [
                (
                    "class",
                    f"{escape(pair.pair_class)} <small>{escape(CLASSES_IN_WORDS.get(pair.pair_class, ''))}</small>",
                ),
                ("in training, at the end", number(pair.score)),
                ("now, on held-out text", number(pair.correlation)),
                ("in the twin, without the penalty", twin),
                (
                    "decoder cosine",
                    f"{number(pair.decoder_cosine)} <small>twin {number(pair.twin_decoder_cosine)}</small>",
                ),
                ("both fire on", f"{pair.support:,} tokens <small>A {pair.fires_a:,}, B {pair.fires_b:,}</small>"),
                ("where B fires, A does", percent(pair.a_given_b)),
                ("where A fires, B does", percent(pair.b_given_a)),
            ]
        )

    def _pair_history(self, pair: PairRecord) -> str:
        points = list(zip(pair.history_steps, pair.history, strict=True))
        known = sum(value is not None for _, value in points)
        if not known:
            return ""
        words = f"selected at {known} of {len(points)} looks; gaps: it was not among the selected pairs"
        curve = curves_html({"correlation": points}, "step", f"Correlation over the training ({words})", low=0.0)
        return f'<div class="so-half">{curve}</div>'


def sort_column(index: FeatureIndex, asked: str) -> str:
    """The column that the table of pairs is sorted by: the one that was asked for, else that of the selection.

    Raises:
        SelOrthoError: there is no such column.
    """
    chosen = "score" if index.facts["pairs"].get("source") == "training" else "correlation"
    if asked and asked not in PAIR_COLUMNS:
        raise SelOrthoError(f"sort={asked!r:.50}: expected one of {', '.join(PAIR_COLUMNS)}")
    return asked or chosen


def sorted_pairs(index: FeatureIndex, address: Address) -> list[dict[str, Any]]:
    """Rows of the table of pairs: filtered by class, feature number or label, sorted; the undefined come last."""
    rows: list[dict[str, Any]] = index.pair_table.to_pylist()
    if address.only:
        rows = [row for row in rows if row["pair_class"] == address.only]
    wanted = address.q.strip().lower()
    if wanted.isdecimal():
        rows = [row for row in rows if int(wanted) in (row["a"], row["b"])]
    elif wanted:
        rows = [row for row in rows if any(wanted in index.label(row[side]).lower() for side in "ab")]
    column = sort_column(index, address.sort)
    known = [row for row in rows if row[column] is not None]
    unknown = [row for row in rows if row[column] is None]
    known.sort(key=lambda row: row[column], reverse=not address.up)
    return known + unknown
