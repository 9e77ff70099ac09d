"""The views of the page: an address in, HTML out."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Mapping

from .. import SelOrthoError
from ..features.index import FeatureIndex
from ..features.render import escape, label_html
from . import parts
from .address import Address
from .live import LiveModel, NotLiveError
from .pair_views import pair_page, pair_table
from .readings import compared, read_text, shaded_text
from .run_page import run_page
from .shelf import TWIN, Shown


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
            return pair_page(address, index, index.pair(address.a, address.b), TWIN in self.shelf)
        return parts.section(address, "Pairs", pair_table(address, index))

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
        return parts.note(words) + parts.summaries(address.sae, index.most_frequent(), "The most frequent features")

    def _steps(self, address: Address, index: FeatureIndex) -> str:
        number_, firing = address.id or 0, index.firing_features()
        place, behind = bisect.bisect_left(firing, number_), bisect.bisect_right(firing, number_)
        before = firing[place - 1] if place > 0 else None
        after = firing[behind] if behind < len(firing) else None
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
