"""The views of the page: an address in, HTML out."""

from __future__ import annotations

import bisect
import logging
import random
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ..errors import SelOrthoError
from ..features import FeatureIndex, FeatureRecord
from ..features.records import FeatureContext
from ..hub.card_results import ALL_LAYERS
from ..utils.names import RepoRef
from .address import MAIN, TWIN, VIEWS, Address
from .catalog import CatalogEntry
from .charts import curves, histogram
from .concept_view import concept_page
from .feature_table import feature_table
from .graph_view import Graphs, graph_page
from .live_model import LiveModel, NotLiveError
from .pairs import pair_page, pair_table
from .rendering import note, percent, problem, view
from .start_view import number_of, start_page, without_folders
from .text_view import activations_on, compared_values, text_values

logger = logging.getLogger(__name__)

EXAMPLES = (
    "The weather in Paris was cold, so the match was moved to Monday.",
    "import os\nfor name in os.listdir('.'):\n    print(name)",
    "Shares of the company fell 12 percent after the report.",
)
MEASURED = {  # in metrics.json, with name and meaning
    "fvu": ("FVU", "unexplained variance, less is better"),
    "l0": ("L0", "features that fire on a token"),
    "loss_recovered": ("loss recovered", "of the language model, 1 is perfect"),
    "kl": ("KL divergence", "of the predictions with the reconstruction in place, in nats per token"),
    "top1_agreement": ("top-1 agreement", "tokens whose likeliest successor stays the same"),
    "top_correlation": ("mean of the top pairs", "correlation of the most correlated 0.1% of pairs"),
    "peak_correlation": ("peak correlation", "of any pair"),
    "max_decoder_cosine": ("mean maximum decoder cosine", "of each feature with its nearest"),
    "dead_features": ("dead features", "that never fired on the evaluation's text"),
}
CURVES = {  # in metrics.jsonl, with the title of their chart
    "fvu": "FVU",
    "l0": "L0",
    "top_correlation": "Mean of the selected pairs (correlation, or cosine where these select)",
    "dead_features": "Dead features",
}
HEADS = 8  # shown of a feature that writes to attention heads, the strongest first
_BANDS = (0.8, 0.6, 0.4, 0.2, 0.0)  # quantiles of the activation, from above


class Views:
    """Renders every view; holds nothing of any visitor.

    Args:
        catalog: the SAEs by key. live: the language model. examples: sentences to start with.
        graphs: attribution graphs; the SAEs of their layers can be asked for, too.
    """

    def __init__(
        self,
        catalog: Mapping[str, CatalogEntry],
        live: LiveModel,
        examples: Sequence[str] = EXAMPLES,
        graphs: Graphs | None = None,
    ) -> None:
        self.catalog, self.live, self.examples, self.graphs = catalog, live, examples, graphs or Graphs()
        self._entries = {entry.key: entry for entry in self.graphs.layers.values()} | dict(catalog)

    def render(self, address: Address) -> str:
        """Render the view of an address; mistakes and what is missing are said in words."""
        try:
            return str(getattr(self, address.view)(address))
        except NotLiveError as error:
            return note(address, VIEWS[address.view], f"{error}. Features and pairs can be browsed all the same.")
        except SelOrthoError as error:
            return problem(address, str(error))
        except Exception:
            logger.exception("view %s", address.view)
            return problem(address, "Something went wrong here; the log of the page says what. Try another view.")

    def entry(self, sae: str) -> CatalogEntry:
        """Return an SAE of the page.

        Raises:
            SelOrthoError: it is not on this page.
        """
        if sae not in self._entries:
            raise SelOrthoError(f"sae={sae!r:.50}: this page shows {' and '.join(self._entries)}")
        return self._entries[sae]

    def index(self, sae: str) -> FeatureIndex:
        """Return the feature index of an SAE of the page.

        Raises:
            SelOrthoError: it has none.
        """
        entry = self.entry(sae)
        if entry.index is None:
            raise SelOrthoError(
                f"{entry.title} has no feature index, so only live text is shown: build one with selortho index"
            )
        return entry.index

    def text(self, address: Address) -> str:
        """Show which features fire on each token of a sentence."""
        entry = self.entry(address.sae)
        if not address.q.strip():
            return view("invitation.html", address, "Text", examples=self.examples)
        reading = self.live.capture(address.q, entry.key)
        return view("text.html", address, f"Text: {address.q[:40]}", **text_values(address, entry, reading))

    def start(self, address: Address) -> str:
        """Show what the SAE is, and features worth a look."""
        example = None if self.live.why_absent else next(iter(self.examples), None)
        return start_page(address, self.beside(address.sae), example)

    def features(self, address: Address) -> str:
        """Show the table of all features."""
        return feature_table(address, self.index(address.sae))

    def concepts(self, address: Address) -> str:
        """Show the features that find a concept."""
        self.index(address.sae)
        return concept_page(address, self.beside(address.sae))

    def beside(self, sae: str) -> list[CatalogEntry]:
        """Return an SAE of the page, then the others.

        Raises:
            SelOrthoError: it is not on this page.
        """
        entry = self.entry(sae)
        others = self.catalog.values() if sae in self.catalog else ()
        return [entry, *(other for other in others if other is not entry)]

    def feature(self, address: Address) -> str:
        """Show all about a feature."""
        index = self.index(address.sae)
        record = index.feature(address.id)  # type: ignore[arg-type]
        return view(
            "feature.html",
            address,
            f"Feature {record.feature}",
            entry=self.entry(address.sae),
            record=record,
            steps=_steps(index.firing_features(), record.feature),
            histogram=histogram(record.histogram),
            pairs=index.pairs_of(record.feature)[:20],
            lens=index.logit_lens,
            heads=sorted(enumerate(record.head_shares), key=lambda head: -head[1])[:HEADS],
            groups=_context_groups(record),
            **self._on_my_text(address, record.feature),
        )

    def _on_my_text(self, address: Address, feature: int) -> dict[str, Any]:
        if not address.q.strip():
            return {"reading": None, "no_reading": ""}
        try:
            reading = self.live.capture(address.q, address.sae)
        except SelOrthoError as error:
            return {"reading": None, "no_reading": str(error)}
        return {"reading": reading, "activations": activations_on(reading, feature).tolist()}

    def pairs(self, address: Address) -> str:
        """Show the pairs that the penalty acted on, or one of them."""
        index = self.index(address.sae)
        if address.a is not None and address.b is not None:
            return pair_page(address, index, TWIN in self.catalog)
        return pair_table(address, index)

    def search(self, address: Address) -> str:
        """Show features by label, by a token that they promote, or by a phrase on which they fire."""
        index, wanted = self.index(address.sae), address.q.strip()
        if not wanted:
            return note(address, "Search", "Search features by their label, by a token, or by a phrase.")
        if address.by == "phrase":
            reading = self.live.capture(address.q, address.sae)
            features = [index.summary(feature) for feature, _ in reading.strongest(30)]
            caption = f"Features that fire on “{address.q}”, the strongest first"
        elif address.by == "token":
            features, caption = index.search_promoted(wanted), f"Features that promote “{wanted}”"
        else:
            features, caption = index.search_labels(wanted), f"Features with “{wanted}” in their label"
        if not features:
            return note(address, "Search", f"No feature found: {caption.lower()}.")
        return view("search.html", address, f"Search: {address.q[:40]}", found=features, caption=caption)

    def steer(self, address: Address) -> str:
        """Explain steering, before anything was generated."""
        index = self.catalog[MAIN].index
        has_example = index is not None and bool(index.firing_features())
        return view("steer.html", address, "Steer", plain=None, has_example=has_example)

    def compare(self, address: Address) -> str:
        """Show two SAEs on one sentence."""
        entries = list(self.catalog.values())
        if address.other:
            other = RepoRef.parse(address.other, local=False)
            entries = [entries[0], CatalogEntry(str(other), str(other), other)]
        if len(entries) < 2:
            more = " Name another one of the Hub above." if self.live.allow_other_saes else ""
            words = "There is one SAE on this page; with its twin (--twin) beside it, both can be compared."
            return note(address, "Compare", words + more)
        if not address.q.strip():
            return view("invitation.html", address, "Compare", examples=self.examples)
        readings = [self.live.capture(address.q, entry.key) for entry in entries]
        sides = compared_values(entries, readings, [self.live.sae(entry.key) for entry in entries])
        return view("compare.html", address, f"Compare: {address.q[:40]}", sides=sides)

    def graph(self, address: Address) -> str:
        """Show an attribution graph and the edges of one of its nodes."""
        return graph_page(address, self.graphs)

    def run(self, address: Address) -> str:
        """Show the settings of the training, what was measured beside the twin, and the curves of the training."""
        entry, *_ = entries = self.beside(address.sae)
        measured = [one.metrics.get("evaluation") for one in entries]
        figures = {key: [number_of(metrics, key) for metrics in measured] for key in MEASURED}
        charts = {
            title: curves({one.title: _points(one.rows, key) for one in entries if one.rows})
            for key, title in CURVES.items()
        }
        return view(
            "run.html",
            address,
            "Run",
            config=entry.config,
            lm_name=without_folders(entry.config.lm_name if entry.config else None),
            dataset=without_folders(entry.config.dataset if entry.config else None),
            titles=[one.title for one in entries],
            layers=number_of(entry.all_layers, "layers"),
            replaced=[
                ((metric.name, metric.meaning), values)
                for metric in ALL_LAYERS
                if (values := [number_of(one.all_layers, metric.key) for one in entries])[0] is not None
            ],
            rows=[
                (MEASURED[key], values) for key, values in figures.items() if any(value is not None for value in values)
            ],
            charts={title: chart for title, chart in charts.items() if chart is not None},
        )


def _steps(firing: list[int], feature: int) -> dict[str, int | None]:
    """Other features that fire, by the name of the button that leads there."""
    before, behind = bisect.bisect_left(firing, feature), bisect.bisect_right(firing, feature)
    return {
        "‹ previous": firing[before - 1] if before > 0 else None,
        "next ›": firing[behind] if behind < len(firing) else None,
        "random": random.choice(firing) if firing else None,
    }


def _context_groups(record: FeatureRecord) -> list[tuple[str, list[FeatureContext]]]:
    """The strongest contexts of a feature, then samples by quantile of its activation, with their headings."""
    groups = [("Strongest contexts", [context for context in record.contexts if context.kind == "top"])]
    samples = [context for context in record.contexts if context.kind == "sample"]
    for band, members in groupby(samples, key=lambda context: next((b for b in _BANDS if context.quantile > b), 0.0)):
        heading = f"Samples between the quantiles {percent(band)} and {percent(band + 0.2)} of its activations"
        groups.append((heading, list(members)))
    return groups


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float | None]]:
    return [(step, number_of(row, key)) for row in rows if (step := number_of(row, "step")) is not None]
