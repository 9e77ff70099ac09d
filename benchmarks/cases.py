"""What is timed: one case for every penalty, and the settings of the SAE that make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_selortho.configuration_selortho import SelOrthoConfig
from hf_selortho.errors import SelOrthoError
from hf_selortho.penalties import full_penalty_bytes
from hf_selortho.utils.memory import available_memory

ENCODER, NONE = "encoder", "none"  # the yardsticks
ORTSAE_INTERVALS = (1, 5)
ACTIVATIONS = {
    "topk": "topk",
    "relu": "relu, thresholds set",
    "relu-dense": "relu, freshly initialised",
}
_MODES: dict[str, tuple[str, dict[str, Any]]] = {
    ENCODER: ("encoder only", {}),
    NONE: ("no penalty", {"penalty": "none"}),
    "selective": ("selective", {"penalty_space": "activation"}),
    "every-step": ("selective, every step", {"penalty_space": "activation", "penalty_schedule": "every_step"}),
    "decoder": ("selective, decoder space", {"penalty_space": "decoder"}),
    "ortsae": ("OrtSAE", {"penalty": "ortsae"}),
    "full": ("full", {"penalty": "full"}),
}
MODES = tuple(_MODES)
_COMMON = {
    "penalty": "selective",
    "penalty_schedule": "on_selection",
    "selection_space": "same",
    "carry_decay": 0.0,
    "decoder_ratio": 0.0,
}


@dataclass(frozen=True)
class Case:
    """A penalty and how often it selects."""

    mode: str  # one of MODES
    interval: int = 1  # steps between two selections; so many steps are timed as one repetition

    @property
    def label(self) -> str:
        """Its name in tables and pictures."""
        name = _MODES[self.mode][0]
        return f"{name}, r={self.interval}" if self.interval > 1 else name

    def config(self, base: SelOrthoConfig) -> SelOrthoConfig:
        """The settings `base` with this penalty."""
        coefficient = base.ortho_coefficient or 0.1  # a penalty of weight 0 costs nothing
        own = {**_COMMON, **_MODES[self.mode][1], "selection_interval": self.interval}
        return SelOrthoConfig(**{**base.own_settings(), "ortho_coefficient": coefficient, **own})


def cases_of(only: Sequence[str] | None, intervals: Sequence[int]) -> list[Case]:
    """The cases of some modes (None: all), the yardsticks always, the selective ones for every interval.

    Raises:
        SelOrthoError: an unknown mode.
    """
    unknown = sorted(set(only or ()) - set(MODES))
    if unknown:
        raise SelOrthoError(f"--only {' '.join(unknown)}: expected some of {', '.join(MODES)}")
    wanted = {ENCODER, NONE} | set(MODES if only is None else only)
    cases = []
    for mode in MODES:
        chosen: Sequence[int] = (1,)
        if mode == "ortsae":
            chosen = ORTSAE_INTERVALS
        elif mode == "every-step":  # with interval 1 it is what "selective" is
            chosen = [r for r in intervals if r > 1]
        elif mode in ("selective", "decoder"):
            chosen = intervals
        cases += [Case(mode, r) for r in chosen if mode in wanted]
    return cases


def base_config(activation: str, d_in: int, d_sae: int, k: int) -> SelOrthoConfig:
    """Settings of an untrained SAE."""
    if activation == "topk":
        return SelOrthoConfig(d_in=d_in, d_sae=d_sae, activation="topk", k=k)
    return SelOrthoConfig(d_in=d_in, d_sae=d_sae, activation="relu")


@dataclass(frozen=True)
class Conditions:
    """What the cases of one SAE run on, and how long they may take."""

    n: int
    batch: int
    d_in: int
    device: torch.device
    product_seconds: float  # of the encoder's matrix product, the measure of the machine's speed
    limit_seconds: float  # of a step


def refusal(case: Case, on: Conditions, earlier: tuple[int, float] | None = None) -> str | None:
    """Why a case is not tried; None if it is.

    The full penalty has to fit in memory and its estimated time in the limit. Any case is refused whose time on fewer
    features, `earlier` (features, seconds a step), exceeds the limit when it grows no faster than linearly.
    """
    seconds, words = 0.0, ""
    if case.mode == "full":
        needed, available = full_penalty_bytes(on.n, on.batch), available_memory(on.device)
        if available is not None and needed > available:
            return f"needs {needed:,} bytes ({needed / 2**30:.1f} GiB), {available:,} are available"
        seconds, words = full_penalty_seconds(on.n, on.d_in, on.product_seconds), "about"
    if earlier is not None and earlier[1] * on.n / earlier[0] > seconds:
        seconds, words = earlier[1] * on.n / earlier[0], "at least"
    if seconds <= on.limit_seconds:
        return None
    return f"would take {words} {seconds:,.0f} s a step (--limit_seconds {on.limit_seconds:g})"


def full_penalty_seconds(n: int, d_in: int, product_seconds: float) -> float:
    """Two products of `n^2 B` multiplications, at the speed of the encoder's `d_in n B`."""
    return product_seconds * 2 * n / d_in
