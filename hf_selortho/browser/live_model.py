"""The language model behind the page: loaded in the background, used by one visitor at a time."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..checks import text_of
from ..errors import SelOrthoError
from ..features import FeatureCapture, Generation, Sampling, Steer, Steering, TokenFeatures
from ..formats import load_sae
from ..language_models.loading import LanguageModel, load_language_model
from ..modeling_selortho import SelOrthoSAE
from ..utils.names import RepoRef
from .address import MAIN, MAX_CHARACTERS
from .catalog import CatalogEntry

logger = logging.getLogger(__name__)

MAX_TOKENS = 256  # of a text, BOS included
MAX_NEW_TOKENS = 60
_OTHERS_KEPT = 2  # SAEs of visitors, where the owner allows them
_PATIENCE = 180.0  # seconds that a visitor waits for the model


class NotLiveError(SelOrthoError):
    """There is no language model here; the message says why."""


class LiveModel:
    """Reads texts and generates with the language model of an SAE's training.

    All that runs the model is behind one lock: results never mix. Nothing of a text is kept.

    Args:
        catalog: the SAEs of the page. Their weights are loaded beside the language model, and not without it.
        lm: name of the language model; "auto": the one of the training; "none": no live text.
        allow_other_saes: whether visitors may name any SAE of the Hub.
        approximate: whether what cannot be read exactly is read all the same.
    """

    def __init__(
        self,
        catalog: Mapping[str, CatalogEntry],
        lm: str = "auto",
        allow_other_saes: bool = False,
        approximate: bool = False,
    ) -> None:
        self.allow_other_saes, self._approximate = allow_other_saes, approximate
        self._catalog, self._lm_name = catalog, lm
        self._lock, self._loaded = threading.Lock(), threading.Event()
        self._captures: dict[str, FeatureCapture] = {}
        self._others: OrderedDict[str, FeatureCapture] = OrderedDict()
        self._why_absent: str | None = None  # once loading has failed, or nothing is to be loaded
        if lm == "none":
            self._why_absent = "its owner has switched live text off (LM=none)"
            self._loaded.set()

    @property
    def why_absent(self) -> str | None:
        """Why there is no live text; None where there is, or where the language model is still loading."""
        return self._why_absent

    def start_loading(self) -> None:
        """Load the language model and the SAEs in the background."""
        if not self._loaded.is_set():
            threading.Thread(target=self._load, name="language model", daemon=True).start()

    def capture(self, text: str, key: str = MAIN) -> TokenFeatures:
        """Return the tokens of a text and the features of an SAE on them.

        Raises:
            NotLiveError: there is no language model.
            SelOrthoError: the text is empty or too long.
        """
        check_text(text)
        self._wait()
        with self._lock:
            capture = self._capture(key)
            tokens = len(capture.lm.tokenizer(text).input_ids)
            if tokens > MAX_TOKENS:
                raise SelOrthoError(f"the text has {tokens} tokens: this page reads at most {MAX_TOKENS}")
            (features,) = capture.capture([text])
        return features

    def sae(self, key: str = MAIN) -> SelOrthoSAE:
        """Return the SAE, with its weights.

        Raises:
            NotLiveError: there is no language model.
        """
        self._wait()
        return self._capture(key).sae

    def stream(self, prompt: str, steers: Sequence[Steer], sampling: Sampling, key: str = MAIN) -> Iterator[Generation]:
        """Continue a prompt, longer by a token each time; others may read their texts between two tokens.

        Raises:
            NotLiveError: there is no language model.
            SelOrthoError: the prompt or what is asked for is too long, or a feature is out of range.
        """
        check_text(prompt)
        if not 1 <= sampling.max_new_tokens <= MAX_NEW_TOKENS:
            raise SelOrthoError(f"{sampling.max_new_tokens} new tokens: this page writes 1 to {MAX_NEW_TOKENS}")
        self._wait()
        with self._lock:
            capture = self._capture(key)
            generations = Steering(capture.sae, capture.lm).stream(prompt, steers, sampling)
        while True:
            with self._lock:
                generation = next(generations, None)
            if generation is None:
                return
            yield generation

    def _wait(self) -> None:
        if not self._loaded.wait(_PATIENCE):
            raise NotLiveError("the language model is still loading: try again in a minute")
        if self._why_absent is not None:
            raise NotLiveError(f"there is no live text here: {self._why_absent}")

    def _capture(self, key: str) -> FeatureCapture:
        if key in self._captures:
            return self._captures[key]
        if key in self._catalog:
            raise NotLiveError(f"{self._catalog[key].title} could not be loaded beside the language model; see the log")
        if not self.allow_other_saes:
            raise SelOrthoError(f"unknown SAE {key!r:.100}: this page shows {' and '.join(self._catalog)}")
        if key not in self._others:
            repo = RepoRef.parse(key, local=False)
            sae = load_sae(repo.name, approximate=self._approximate, **repo.lookup)
            self._others[key] = FeatureCapture(sae, self._captures[MAIN].lm)
            if len(self._others) > _OTHERS_KEPT:
                self._others.popitem(last=False)
        self._others.move_to_end(key)
        return self._others[key]

    def _load(self) -> None:
        try:
            lm: LanguageModel | None = None
            for key, entry in self._catalog.items():
                sae: Any = load_sae(entry.repo.name, approximate=self._approximate, **entry.repo.lookup)
                lm = lm or self._language_model(sae)
                self._captures[key] = FeatureCapture(sae.to(lm.model.device), lm)
        except SelOrthoError as error:
            logger.warning("no live text: %s", error)
            if MAIN not in self._captures:
                self._why_absent = str(error)
        except Exception:  # whatever a library raises: the rest of the page works without
            logger.exception("no live text")
            if MAIN not in self._captures:
                self._why_absent = "the language model could not be loaded; the log of the page says why"
        finally:
            self._loaded.set()

    def _language_model(self, sae: SelOrthoSAE) -> LanguageModel:
        config, wanted = sae.config, self._lm_name
        name = config.lm_name if wanted == "auto" else wanted
        if name is None:
            raise SelOrthoError("the SAE does not say which language model it reads: pass --lm")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_language_model(name, config.lm_revision if wanted == "auto" else None, device=device)


def check_text(text: str) -> None:
    """Refuse a text that is empty or too long, before anything is computed.

    Raises:
        SelOrthoError: it is.
    """
    if not text_of(text, "the text").strip():
        raise SelOrthoError("the text is empty: type a sentence")
    if len(text) > MAX_CHARACTERS:
        raise SelOrthoError(f"the text has {len(text):,} characters: this page reads at most {MAX_CHARACTERS:,}")
