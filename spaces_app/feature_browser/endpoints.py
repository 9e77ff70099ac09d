"""The page's functions for programs: named endpoints of the API, and tools of its MCP server."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gradio as gr

from hf_selortho import SelOrthoError
from hf_selortho.features import TokenFeatures
from hf_selortho.features.index import FeatureIndex
from hf_selortho.features.records import FeatureSummary
from hf_selortho.features.sampling import Sampling

from .address import Address
from .live import LiveModel
from .pair_views import sorted_pairs
from .readings import counterpart
from .shelf import MAIN, TWIN, Shown
from .steer_page import steers_of
from .views import Views

logger = logging.getLogger("hf_selortho.space")

MOST = 100  # rows of an answer


def add_endpoints(shelf: dict[str, Shown], live: LiveModel, views: Views) -> None:
    """Add them to the Blocks that are being built; each takes and gives plain JSON."""
    api = Endpoints(shelf, live, views)
    for function in (api.inspect_text, api.feature, api.pair, api.pairs, api.search, api.steer, api.compare, api.run):
        name = function.__name__
        limited = {"concurrency_id": "steer", "concurrency_limit": 4} if name == "steer" else {}
        gr.api(_without_traceback(function), api_name=name, **limited)


def _without_traceback(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, whose mistakes reach the caller as words, and whose failures go to the log alone."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SelOrthoError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except (TypeError, ValueError, OverflowError) as error:
            raise gr.Error(f"an argument is not what was expected: {error}", print_exception=False) from None
        except Exception:
            logger.exception("endpoint %s", function.__name__)
            raise gr.Error("something went wrong here; the log of the page says what", print_exception=False) from None

    return called


class Endpoints:
    """What the views show, as plain JSON. `sae` is "main" or "twin" everywhere."""

    def __init__(self, shelf: dict[str, Shown], live: LiveModel, views: Views) -> None:
        self._shelf, self._live, self._views = shelf, live, views

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
        shown = self._shown(sae)
        reading = self._live.capture(text, shown.key)
        return {"sae": shown.title, **_reading(reading, shown.index, _within(top_k))}

    def feature(self, feature: int, sae: str = "main") -> dict[str, Any]:
        """All that is known of a feature: label, frequency, histogram, tokens it promotes, neighbours, contexts.

        Args:
            feature: its number, from 0.
            sae: "main" or "twin".
        """
        return asdict(self._index(sae).feature(int(feature)))

    def pair(self, a: int, b: int, sae: str = "main") -> dict[str, Any]:
        """All that is known of a pair of features that the penalty acted on: class, correlations, contexts.

        Args:
            a: number of one feature.
            b: number of the other one, in either order.
            sae: "main" or "twin".
        """
        record = self._index(sae).pair(int(a), int(b))
        return {**asdict(record), "a_given_b": record.a_given_b, "b_given_a": record.b_given_a}

    def pairs(
        self,
        sort: str = "score",
        ascending: bool = False,
        only: str = "",
        text: str = "",
        limit: int = 50,
        sae: str = "main",
    ) -> dict[str, Any]:
        """The pairs of features that the penalty acted on at the end of the training.

        Args:
            sort: "" for what they were chosen by, else score, correlation, twin_correlation, decoder_cosine or support.
            ascending: the smallest first.
            only: a class: duplicate, nested, co-occurring or unmeasured; "" for all.
            text: a feature's number, or a word of a label; "" for all.
            limit: at most so many pairs, 100 at most.
            sae: "main" or "twin".
        """
        index = self._index(sae)
        rows = sorted_pairs(index, Address(view="pairs", sort=sort, up=bool(ascending), only=only, q=text))
        return {"total": len(rows), "rule": index.facts["pairs"].get("rule", ""), "pairs": rows[: _within(limit)]}

    def search(self, query: str, by: str = "label", limit: int = 20, sae: str = "main") -> list[dict[str, Any]]:
        """Features by label, by a token that they promote, or by a phrase on which they fire.

        Args:
            query: a piece of a label, a token, or a phrase.
            by: "label", "token" or "phrase".
            limit: at most so many features, 100 at most.
            sae: "main" or "twin".
        """
        index, most = self._index(sae), _within(limit)
        if by == "phrase":
            reading = self._live.capture(query, self._shown(sae).key)
            return [_summary(index.summary(f)) | {"activation": value} for f, value in reading.strongest(most)]
        if by not in ("label", "token"):
            raise SelOrthoError(f"by={by!r:.50}: expected label, token or phrase")
        found = index.search_labels(query, most) if by == "label" else index.search_promoted(query, most)
        return [_summary(one) for one in found]

    def steer(
        self,
        prompt: str,
        features: list[int],
        mode: str = "clamp",
        value: float = 5.0,
        max_new_tokens: int = 30,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> dict[str, Any]:
        """What the language model writes with and without some features changed, by the same seed.

        Args:
            prompt: how the text begins.
            features: numbers of the features to change; [] for none.
            mode: "clamp" holds their activations at `value` on every token, "scale" multiplies them by it.
            value: see mode.
            max_new_tokens: 1 to 60.
            temperature: 0 takes the likeliest token.
            seed: of the random numbers.

        Returns:
            unchanged and steered: the two continuations.
        """
        steers = steers_of(features[:8], mode, value)
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
        if TWIN not in self._shelf:
            raise SelOrthoError("there is one SAE on this page: nothing to compare it with")
        keys = (MAIN, TWIN)
        readings = {key: self._live.capture(text, key) for key in keys}
        found: dict[str, Any] = {}
        for own, other in (keys, keys[::-1]):
            rows = []
            for feature, activation in readings[own].strongest(_within(top_k)):
                nearest, cosine = counterpart(self._live.sae(own), feature, self._live.sae(other))
                rows.append({"feature": feature, "activation": activation, "nearest": nearest, "cosine": cosine})
            found[own] = {"sae": self._shelf[own].title, "strongest": rows}
        return found

    def run(self, sae: str = "main") -> dict[str, Any]:
        """The settings of the SAE's training and what was measured of it on held-out text.

        Args:
            sae: "main" or "twin".
        """
        shown = self._shown(sae)
        settings = {} if shown.config is None else shown.config.own_settings()
        return {"sae": shown.title, "settings": settings, "metrics": shown.metrics}

    def _shown(self, sae: str) -> Shown:
        return self._views.shown(Address(sae=sae))

    def _index(self, sae: str) -> FeatureIndex:
        return self._views.index(Address(sae=sae))


def _within(limit: int) -> int:
    return min(max(int(limit), 1), MOST)


def _summary(found: FeatureSummary) -> dict[str, Any]:
    return dict(vars(found))


def _reading(reading: TokenFeatures, index: FeatureIndex | None, k: int) -> dict[str, Any]:
    def named(feature: int, activation: float) -> dict[str, Any]:
        return {"feature": feature, "label": "" if index is None else index.label(feature), "activation": activation}

    tokens = [
        {"token": token, "read": kept, "features": [named(*one) for one in found]}
        for token, kept, found in zip(reading.tokens, reading.trained_on.tolist(), reading.top(k), strict=True)
    ]
    return {"tokens": tokens, "strongest": [named(*one) for one in reading.strongest(k)]}
