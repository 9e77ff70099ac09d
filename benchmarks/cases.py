"""What is timed: one case for every penalty, and the settings of the SAE that make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_selortho.configuration_selortho import SelOrthoConfig
from hf_selortho.errors import SelOrthoError

ENCODER, NONE = "encoder", "none"  # the yardsticks
ORTSAE_INTERVALS = (1, 5)
ACTIVATIONS = {"topk": "topk", "relu": "relu, thresholds set", "relu-dense": "relu, freshly initialised"}
_MODES: dict[str, tuple[str, dict[str, Any]]] = {  # name in tables and settings
    ENCODER: ("encoder only", {}),
    NONE: ("no penalty", {"penalty": "none"}),
    "selective": ("selective", {}),
    "every-step": ("selective, every step", {"penalty_schedule": "every_step"}),
    "decoder": ("selective, decoder space", {"penalty_space": "decoder"}),
    "ortsae": ("OrtSAE", {"penalty": "ortsae"}),
    "full": ("full", {"penalty": "full"}),
}
MODES = tuple(_MODES)


@dataclass(frozen=True)
class Case:
    """A penalty and how often it selects pairs."""

    mode: str  # one of MODES
    interval: int = 1  # steps between two selections; so many steps are timed as one repetition

    @property
    def label(self) -> str:
        """Its name in tables and pictures."""
        name = _MODES[self.mode][0]
        return f"{name}, r={self.interval}" if self.interval > 1 else name

    def config(self, base: SelOrthoConfig) -> SelOrthoConfig:
        """Return the settings `base` with this penalty."""
        penalty = {"penalty": "selective", "penalty_space": "activation", "penalty_schedule": "on_selection"}
        penalty |= _MODES[self.mode][1]
        return SelOrthoConfig(
            **{**base.own_settings(), "ortho_coefficient": 0.1, "selection_interval": self.interval, **penalty}
        )


def cases_of(only: Sequence[str], intervals: Sequence[int]) -> list[Case]:
    """List the cases of some modes (none: of all), the yardsticks always, the selective ones for every interval.

    Raises:
        SelOrthoError: an unknown mode.
    """
    if unknown := sorted(set(only) - set(MODES)):
        raise SelOrthoError(f"--only {' '.join(unknown)}: expected some of {', '.join(MODES)}")
    of_mode: dict[str, Sequence[int]] = {
        "selective": intervals, "decoder": intervals, "ortsae": ORTSAE_INTERVALS,
        "every-step": [r for r in intervals if r > 1],  # with interval 1 it is what "selective" is
    }  # fmt: skip
    wanted = {ENCODER, NONE, *(only or MODES)}
    return [Case(mode, interval) for mode in MODES if mode in wanted for interval in of_mode.get(mode, (1,))]


def base_config(activation: str, d_in: int, d_sae: int, k: int, **settings: Any) -> SelOrthoConfig:
    """Return the settings of an untrained SAE; `activation` is one of ACTIVATIONS."""
    own = {"activation": "topk", "k": k} if activation == "topk" else {"activation": "relu"}
    return SelOrthoConfig(d_in=d_in, d_sae=d_sae, **own, **settings)
