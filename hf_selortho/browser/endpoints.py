"""The page's functions for programs: named endpoints of the API, and tools of its MCP server."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gradio as gr

from ..checks import whole_number
from ..errors import SelOrthoError
from ..features import Sampling
from ..utils.library_errors import one_line
from .address import MAIN, TWIN, Address
from .concept_view import choose, concepts_of
from .feature_table import feature_rows, sorted_features
from .pairs import find_pairs
from .start_view import figures, gallery, probes
from .steering_view import DEFAULT_STRENGTH, PEAK, steers_of
from .text_view import counterparts
from .views import Views

logger = logging.getLogger(__name__)

STEERING_LIMIT: dict[str, Any] = {"concurrency_id": "steer", "concurrency_limit": 4}
_MOST = 100  # rows of an answer


def add_endpoints(views: Views) -> None:
    """Add the endpoints to the Blocks that are being built; each takes and gives plain JSON."""
    api = Endpoints(views)
    tables = (api.features, api.concepts, api.pairs)
    others = (api.start, api.inspect_text, api.feature, api.pair, api.search, api.steer, api.compare, api.run)
    for function in (*others, *tables):
        limit = STEERING_LIMIT if function == api.steer else {}
        gr.api(_without_traceback(function), api_name=function.__name__, **limit)


def _without_traceback(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let mistakes reach the caller as words, and failures the log alone."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SelOrthoError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except (TypeError, ValueError, OverflowError) as error:
            raise gr.Error(f"an argument is not what was expected: {one_line(error)}", print_exception=False) from None
        except Exception:
            logger.exception("endpoint %s", function.__name__)
            raise gr.Error("something went wrong here; the log of the page says what", print_exception=False) from None

    return called


class Endpoints:
    """What the views show, as plain JSON. `sae` is "main" or "twin" everywhere."""

    def __init__(self, views: Views) -> None:
        self._views, self._live = views, views.live

    def start(self, sae: str = "main") -> dict[str, Any]:
        """What the page opens on: figures of the sparse autoencoder beside its twin, and features worth a look.

        Args:
            sae: "main" or "twin".

        Returns:
            figures: name, meaning, and value for each of `saes`; features: twelve at most, with label and a context.
        """
        entries = self._views.beside(sae)
        measured = [*figures(entries), *((f"probe AUC, {name}", *more) for name, *more in probes(entries))]
        return {
            "saes": [entry.title for entry in entries],
            "figures": [{"name": name, "meaning": meaning, "values": values} for name, meaning, values in measured],
            "features": [] if entries[0].index is None else gallery(entries[0].index),
        }

    def inspect_text(self, text: str, top_k: int = 5, sae: str = "main") -> dict[str, Any]:
        """Which features of the sparse autoencoder fire on each token of a text.

        Args:
            text: at most 2,000 characters and 256 tokens.
            top_k: features for each token, the strongest first; at most 100.
            sae: "main", or "twin", the same SAE trained without the penalty.

        Returns:
            tokens: for each token its text, whether the SAE reads it, and its features with label and activation;
            strongest: the features of the largest activation anywhere in the text.
        """
        entry, k = self._views.entry(sae), _within(top_k)
        reading = self._live.capture(text, entry.key)

        def named(feature: int, activation: float) -> dict[str, Any]:
            return {"feature": feature, "label": entry.label(feature), "activation": activation}

        tokens = [
            {"token": token, "read": read, "features": [named(*one) for one in firing]}
            for token, read, firing in zip(reading.tokens, reading.trained_on.tolist(), reading.top(k), strict=True)
        ]
        strongest = [named(*one) for one in reading.strongest(k)]
        return {"sae": entry.title, "tokens": tokens, "strongest": strongest}

    def feature(self, feature: int, sae: str = "main") -> dict[str, Any]:
        """All that is known of a feature: label, frequency, histogram, tokens it promotes, neighbours, contexts.

        Args:
            feature: its number, from 0.
            sae: "main" or "twin".
        """
        return asdict(self._views.index(sae).feature(int(feature)))

    def features(
        self,
        sort: str = "",
        ascending: bool = False,
        kind: str = "",
        text: str = "",
        low: float = 0.0,
        high: float = 100.0,
        limit: int = 50,
        sae: str = "main",
        score: float = 0.0,
    ) -> dict[str, Any]:
        """The features of the sparse autoencoder: label, how it was got, its score, frequency; best labels first.

        Args:
            sort: "" for the best labels first, else feature, label, label_source, label_score, frequency or
                max_activation.
            ascending: the smallest first.
            kind: of label: token, context, concept, model, file, unclear, none or tokens; "" for all.
            text: a feature's number, or a piece of a label; "" for all.
            low: percent of the tokens on which a feature fires at least.
            high: percent of the tokens below which it stays; 100 for no limit.
            limit: at most so many features, 100 at most.
            sae: "main" or "twin".
            score: of the label, from 0 to 1, at least; 0 for features without a score, too.

        Returns:
            total: how many features there are of this kind, text, frequency and score; features: the first of them.
        """
        index = self._views.index(sae)
        address = Address(sort=sort, up=bool(ascending), only=kind, q=text)
        address = address.to(low=float(low), high=float(high), score=float(score))
        found = sorted_features(index, address)
        return {"total": len(found), "features": feature_rows(index, found[: _within(limit)])}

    def concepts(self, concept: str = "", sae: str = "main") -> dict[str, Any]:
        """The concepts that were measured, and the features that find one of them by themselves.

        Args:
            concept: name of a concept, as in the answer; "" for the one that a feature finds best.
            sae: "main" or "twin".

        Returns:
            concepts: name, title, whether the training may have read its texts, and test AUC of its best feature;
            features: those of the concept, the best first, with label, AUC and whether they mark the other class.
        """
        self._views.index(sae)
        entry = self._views.entry(sae)
        measured = concepts_of(entry)
        if not measured:
            return {"concepts": [], "concept": None, "features": []}
        chosen = choose(measured, concept)
        return {
            "concepts": [
                {"concept": one.name, "title": one.title, "trained_on": one.trained_on, "auc": one.auc}
                for one in measured.values()
            ],
            "concept": chosen.name,
            "features": [
                {**vars(row), "negated": row.title != chosen.title, "label": entry.label(row.feature)}
                for row in chosen.rows
            ],
        }

    def pair(self, a: int, b: int, sae: str = "main") -> dict[str, Any]:
        """All that is known of a pair of features that the penalty acted on: class, correlations, contexts.

        Args:
            a: number of one feature.
            b: number of the other one, in either order.
            sae: "main" or "twin".
        """
        record = self._views.index(sae).pair(int(a), int(b))
        return {**asdict(record), "a_given_b": record.a_given_b, "b_given_a": record.b_given_a}

    def pairs(
        self,
        sort: str = "",
        ascending: bool = False,
        only: str = "",
        text: str = "",
        limit: int = 50,
        sae: str = "main",
        hidden: bool = False,
    ) -> dict[str, Any]:
        """The pairs of features that the penalty acted on at the end of the training.

        Args:
            sort: "" for the difference to the twin (without one, what they were chosen by), else difference, score,
                correlation, twin_correlation, decoder_cosine or support.
            ascending: the smallest first.
            only: a class: duplicate, nested, co-occurring or unmeasured; "" for all.
            text: a feature's number, or a word of a label; "" for all.
            limit: at most so many pairs, 100 at most.
            sae: "main" or "twin".
            hidden: give those of dense features (on more than 10% of tokens), white space and punctuation, too.

        Returns:
            total: how many there are; hidden: of the latter kind; pairs: those of the largest value.
        """
        index = self._views.index(sae)
        address = Address(view="pairs", sort=sort, up=bool(ascending), only=only, q=text, hidden=bool(hidden))
        found, rule = find_pairs(index, address), index.facts["pairs"].get("rule", "")
        return {
            "total": len(found.rows), "hidden": found.hidden, "rule": rule, "pairs": found.rows[: _within(limit)]
        }  # fmt: skip

    def search(self, query: str, by: str = "label", limit: int = 20, sae: str = "main") -> list[dict[str, Any]]:
        """Features by label, by a token that they promote, or by a phrase on which they fire.

        Args:
            query: a piece of a label, a token, or a phrase.
            by: "label", "token" or "phrase".
            limit: at most so many features, 100 at most.
            sae: "main" or "twin".
        """
        index, most = self._views.index(sae), _within(limit)
        if by == "phrase":
            strongest = self._live.capture(query, sae).strongest(most)
            return [{**vars(index.summary(feature)), "activation": value} for feature, value in strongest]
        if by not in ("label", "token"):
            raise SelOrthoError(f"by={by!r:.50}: expected label, token or phrase")
        features = index.search_labels(query, most) if by == "label" else index.search_promoted(query, most)
        return [vars(feature) for feature in features]

    def steer(
        self,
        prompt: str,
        features: list[int],
        mode: str = PEAK,
        value: float = DEFAULT_STRENGTH,
        max_new_tokens: int = 30,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> dict[str, Any]:
        """What the language model writes with and without some features changed, by the same seed.

        Args:
            prompt: how the text begins.
            features: numbers of the features to change; [] for none.
            mode: "peak" holds their activations at `value` times the largest one that each has on the text of the
                index, on every token; "clamp" at `value` itself; "scale" multiplies them by it.
            value: see mode.
            max_new_tokens: 1 to 60.
            temperature: 0 takes the likeliest token.
            seed: of the random numbers.

        Returns:
            unchanged and steered: the two continuations.
        """
        index = self._views.catalog[MAIN].index
        end = 10**9 if index is None else len(index)
        numbers = [whole_number(feature, "feature", end=end) for feature in features[:8]]
        steers = steers_of(index, numbers, mode, value)
        sampling = Sampling(int(max_new_tokens), float(temperature), seed=int(seed))
        *_, plain = self._live.stream(prompt, (), sampling)
        *_, steered = self._live.stream(prompt, steers, sampling) if steers else [plain]
        return {"prompt": prompt, "unchanged": plain.text, "steered": steered.text}

    def compare(self, text: str, top_k: int = 10) -> dict[str, Any]:
        """The strongest features of two SAEs on one text, each beside its nearest one in the other SAE.

        Args:
            text: at most 2,000 characters and 256 tokens.
            top_k: features of each, at most 100.
        """
        catalog = self._views.catalog
        if TWIN not in catalog:
            raise SelOrthoError("there is one SAE on this page: nothing to compare it with")
        keys, k = (MAIN, TWIN), _within(top_k)
        readings = {key: self._live.capture(text, key) for key in keys}
        answer: dict[str, Any] = {}
        for this, other in (keys, keys[::-1]):
            saes = (self._live.sae(this), self._live.sae(other))
            rows = [
                {"feature": row.feature, "activation": row.activation, "nearest": row.nearest, "cosine": row.cosine}
                for row in counterparts(saes, (readings[this], readings[other]), k)
            ]
            answer[this] = {"sae": catalog[this].title, "strongest": rows}
        return answer

    def run(self, sae: str = "main") -> dict[str, Any]:
        """The settings of the SAE's training and what was measured of it on held-out text.

        Args:
            sae: "main" or "twin".
        """
        entry = self._views.entry(sae)
        settings = {} if entry.config is None else entry.config.own_settings()
        return {"sae": entry.title, "settings": settings, "metrics": entry.metrics}


def _within(limit: int) -> int:
    return min(max(int(limit), 1), _MOST)
