"""The language model behind the page: loaded in the background, used by one visitor at a time."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hf_selortho import SelOrthoError, SelOrthoSAE
from hf_selortho.features import FeatureCapture, TokenFeatures
from hf_selortho.features.sampling import Sampling
from hf_selortho.features.steering import Generation, Steer, Steering
from hf_selortho.formats import load_sae
from hf_selortho.language_models.loading import LanguageModel, load_language_model
from hf_selortho.utils.hub import RepoRef

from .shelf import MAIN, Settings, Shown

logger = logging.getLogger("hf_selortho.space")

MAX_CHARACTERS = 2000  # of a text
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
        settings: which language model; "none" for none.
        shelf: the SAEs of the page. Their weights are loaded beside the language model, and not without it.
    """

    def __init__(self, settings: Settings, shelf: dict[str, Shown]) -> None:
        self._settings, self._shelf = settings, shelf
        self._lock, self._loaded = threading.Lock(), threading.Event()
        self._captures: dict[str, FeatureCapture] = {}
        self._others: OrderedDict[str, FeatureCapture] = OrderedDict()
        self.why_absent: str | None = None  # once loading has failed, or nothing is to be loaded
        if settings.lm == "none":
            self.why_absent = "its owner has switched live text off (LM=none)"
            self._loaded.set()

    def start_loading(self) -> None:
        """Load in the background."""
        if not self._loaded.is_set():
            threading.Thread(target=self._load, name="language model", daemon=True).start()

    @property
    def is_loading(self) -> bool:
        """Whether it is on its way."""
        return not self._loaded.is_set()

    def wait(self) -> None:
        """Until the language model is there.

        Raises:
            NotLiveError: it will not be.
        """
        if not self._loaded.wait(_PATIENCE):
            raise NotLiveError("the language model is still loading: try again in a minute")
        if self.why_absent is not None:
            raise NotLiveError(f"there is no live text here: {self.why_absent}")

    def capture(self, text: str, key: str = MAIN) -> TokenFeatures:
        """The tokens of a text and the features of an SAE on them.

        Raises:
            NotLiveError: there is no language model.
            SelOrthoError: the text is empty or too long.
        """
        check_text(text)
        self.wait()
        with self._lock:
            capture = self._capture(key)
            check_tokens(capture.lm, text)
            (found,) = capture.capture([text])
        return found

    def sae(self, key: str = MAIN) -> SelOrthoSAE:
        """The SAE, with its weights."""
        self.wait()
        return self._capture(key).sae

    def stream(self, prompt: str, steers: Sequence[Steer], sampling: Sampling, key: str = MAIN) -> Iterator[Generation]:
        """A continuation of a prompt, longer by a token each time; others may read their texts between two tokens.

        Raises:
            NotLiveError: there is no language model.
            SelOrthoError: the prompt or what is asked for is too long, or a feature is out of range.
        """
        check_text(prompt)
        if not 1 <= sampling.max_new_tokens <= MAX_NEW_TOKENS:
            raise SelOrthoError(f"{sampling.max_new_tokens} new tokens: this page writes 1 to {MAX_NEW_TOKENS}")
        self.wait()
        with self._lock:
            capture = self._capture(key)
            parts = Steering(capture.sae, capture.lm).stream(prompt, steers, sampling)
        while True:
            with self._lock:
                part = next(parts, None)
            if part is None:
                return
            yield part

    def _capture(self, key: str) -> FeatureCapture:
        if key in self._captures:
            return self._captures[key]
        if key in self._shelf:
            raise NotLiveError(f"{self._shelf[key].title} could not be loaded beside the language model; see the log")
        return self._other(key)

    def _other(self, name: str) -> FeatureCapture:
        """An SAE of the Hub that a visitor has named."""
        if not self._settings.allow_other_saes:
            raise SelOrthoError(f"unknown SAE {name!r:.100}: this page shows {' and '.join(self._shelf)}")
        place = RepoRef.parse(name, local=False)
        if name not in self._others:
            sae = load_sae(place.name, **place.lookup)
            self._others[name] = FeatureCapture(sae, self._captures[MAIN].lm)
            if len(self._others) > _OTHERS_KEPT:
                self._others.popitem(last=False)
        self._others.move_to_end(name)
        return self._others[name]

    def _load(self) -> None:
        try:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            lm: LanguageModel | None = None
            for key, shown in self._shelf.items():
                sae: Any = load_sae(shown.place.name, **shown.place.lookup)
                if lm is None:
                    lm = self._language_model(sae, device)
                self._captures[key] = FeatureCapture(sae.to(device), lm)
        except SelOrthoError as error:
            logger.warning("no live text: %s", error)
            if MAIN not in self._captures:
                self.why_absent = str(error)
        except Exception:  # whatever a library raises: the rest of the page works without
            logger.exception("no live text")
            if MAIN not in self._captures:
                self.why_absent = "the language model could not be loaded; the log of the page says why"
        finally:
            self._loaded.set()

    def _language_model(self, sae: SelOrthoSAE, device: str) -> LanguageModel:
        config, wanted = sae.config, self._settings.lm
        name = config.lm_name if wanted == "auto" else wanted
        if name is None:
            raise SelOrthoError("the SAE does not say which language model it reads: pass --lm")
        return load_language_model(name, config.lm_revision if wanted == "auto" else None, device=device)


def check_text(text: str) -> None:
    """Refuse what is empty or too long, before anything is computed.

    Raises:
        SelOrthoError: it is.
    """
    if not text.strip():
        raise SelOrthoError("the text is empty: type a sentence")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise SelOrthoError("the text holds half a character (a lone surrogate): type it again")
    if len(text) > MAX_CHARACTERS:
        raise SelOrthoError(f"the text has {len(text):,} characters: this page reads at most {MAX_CHARACTERS:,}")


def check_tokens(lm: LanguageModel, text: str) -> None:
    """Refuse a text of too many tokens.

    Raises:
        SelOrthoError: it has.
    """
    tokens = len(lm.tokenizer(text).input_ids)
    if tokens > MAX_TOKENS:
        raise SelOrthoError(f"the text has {tokens} tokens: this page reads at most {MAX_TOKENS}")
