"""The SAE that a training starts from in place of random weights, and how far its features have moved in the end."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..configuration_selortho import SelOrthoConfig
from ..data.buffer import ActivationStatistics
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..utils.files import write_json
from ..utils.hub import read_object
from ..utils.names import located
from .arguments import TrainingArguments
from .run_folder import MOVED, RUN, START, save_sae

logger = logging.getLogger(__name__)

ALIKE = 0.9  # cosine with its start above which a feature counts as the same one
_QUANTILES = (0.05, 0.25, 0.75, 0.95)
_FIXED = ("d_sae", "activation", "site", "target", "skip")  # what no training changes
_LEAST_LOG_THRESHOLD = -80.0  # of a threshold of 0, whose logarithm is no finite weight


class StartingPoint:
    """An SAE or transcoder of any format that `hf_selortho.load` reads, as the start of a training.

    Attributes:
        config: of the SAE. origin: its name, subfolder, revision and format, for run.json.
    """

    def __init__(self, sae: SelOrthoSAE, origin: Mapping[str, Any]) -> None:
        self._sae: SelOrthoSAE | None = sae
        self.config, self.origin = sae.config, dict(origin)

    @classmethod
    def of(cls, arguments: TrainingArguments, checkpoint: Path | None) -> StartingPoint | None:
        """Read what `--init_from` names, or what the run of a checkpoint has kept of it; None without the option.

        Raises:
            SelOrthoError: it cannot be read.
        """
        name = arguments.run.init_from
        if name is None:
            return None
        kept = checkpoint.parent.parent / START if checkpoint else None
        if kept and (kept / RUN).is_file():
            return cls(SelOrthoSAE.from_pretrained(kept), read_object(kept / RUN)["init_from"])
        loaded = importlib.import_module("hf_selortho.formats.load").read_sae(name, "auto", {})  # of a layer above
        name, lookup = located(name, {})
        where = {"name": name, "subfolder": lookup.get("subfolder"), "revision": loaded.revision}
        return cls(loaded.sae, {**where, "format": loaded.format})

    def adopt(self, arguments: TrainingArguments) -> None:
        """Let the SAE's settings take the place of those of the arguments that nobody has typed.

        Raises:
            SelOrthoError: one that was typed cannot be had, or no layer is known.
        """
        config, sae, given = self.config, arguments.sae, arguments.given
        placed = config.layer is not None or config.hook_name is not None
        fixed = _FIXED if placed and not arguments.model.module else [name for name in _FIXED if name != "site"]
        for name in fixed:
            if name in given and getattr(sae, name) != getattr(config, name):
                raise self._refusal(name, getattr(sae, name), f"; leave --{name} out")
            setattr(sae, name, getattr(config, name))
        for name in {"k", "matryoshka_prefixes"} - given:
            setattr(sae, name, getattr(config, name))
        measured = arguments.run.input_statistics == "measured"
        sae.input_normalization = "standard" if measured else config.input_normalization
        if sae.layer is None and not arguments.run.layers:
            sae.layer = config.layer
            if sae.layer is None and arguments.data.activations is None:
                raise SelOrthoError(f"no layer given: {self.origin['name']} does not say which it reads; pass --layer")

    def check(self, config: SelOrthoConfig) -> None:
        """Refuse an SAE that this one cannot start, by its widths or a variant's own settings.

        Raises:
            SelOrthoError: names the setting.
        """
        for name in ("d_in", "width_out", "d_sae", "activation"):
            if getattr(config, name) != getattr(self.config, name):
                raise self._refusal(name, getattr(config, name), ": choose another one for this language model and run")

    def _refusal(self, name: str, value: Any, remedy: str) -> SelOrthoError:
        return SelOrthoError(
            f"--init_from {self.origin['name']} has {name}={getattr(self.config, name)}, not {value}, and training "
            f"does not change it{remedy}"
        )

    @torch.no_grad()
    def new_sae(self, config: SelOrthoConfig, statistics: ActivationStatistics, measured: bool) -> SelOrthoSAE:
        """Make an SAE with decoder rows of norm 1 that computes what this one does.

        Args:
            config: of the new SAE, whose `centered` becomes that of this one.
            statistics: of the activations to train on.
            measured: whether these take the place of the SAE's own.
        """
        assert self._sae is not None
        config.centered = self.config.centered
        sae = SelOrthoSAE(config)
        sae.load_state_dict(self._sae.state_dict())
        if measured:
            _set_statistics(sae, statistics)
        else:
            self._warn_of_units(sae, statistics)
        norms = sae.W_dec.double().norm(dim=1)
        if not torch.allclose(norms, torch.ones_like(norms), atol=1e-5):
            _normalize_rows(sae, torch.where(norms > 0, norms, 1))
        if "log_threshold" in dict(sae.named_parameters()):
            sae.log_threshold.clamp_(min=_LEAST_LOG_THRESHOLD)
        return sae.train()

    def _warn_of_units(self, sae: SelOrthoSAE, statistics: ActivationStatistics) -> None:
        scale = statistics.target_scale if sae.config.is_transcoder else statistics.scale
        kept = float(sae.output_scale if sae.config.is_transcoder else sae.input_scale)
        if not 0.2 < scale / kept < 5:
            logger.warning(
                "the activations are scaled by %.3g, their own scale is %.3g: beside a squared error in these units, "
                "the coefficients of L1, L0 and penalty weigh other than by default; --input_statistics measured "
                "starts from the same function in units where they weigh as usual",
                *(kept, scale),
            )

    def keep(self, output: Path, anew: bool) -> None:
        """Save the SAE in the folder of the run, for its report, and let go of its weights.

        Args:
            output: the folder.
            anew: replace what is there; else only what is missing is saved.
        """
        if self._sae is not None and (anew or not (output / START / RUN).is_file()):
            (output / START).mkdir(exist_ok=True)
            save_sae(self._sae, output / START)
            write_json(output / START / RUN, {"init_from": self.origin})
        self._sae = None

    def write_moved(self, sae: SelOrthoSAE, output: Path, name: str) -> dict[str, Any]:
        """Write how far each feature of a trained SAE has moved into its folder; returns it in a few figures.

        Args:
            sae: on any device. output: folder of the run. name: of the SAE's folder within it.
        """
        start = SelOrthoSAE.from_pretrained(output / START, dtype=torch.float32)
        cosines = cosines_with(start, sae)
        save_file(cosines, output / name / MOVED)
        return {part: _figures(values) for part, values in cosines.items()}


def cosines_with(start: SelOrthoSAE, sae: SelOrthoSAE) -> dict[str, Tensor]:
    """Compare feature i with feature i of another SAE: the cosines (d_sae,) of "decoder" and "encoder" directions."""
    pairs = {"decoder": (start.W_dec, sae.W_dec), "encoder": (start.W_enc.T, sae.W_enc.T)}
    normalize = torch.nn.functional.normalize
    return {
        part: torch.linalg.vecdot(*(normalize(w.detach().float().cpu(), dim=1, eps=1e-30) for w in both))
        for part, both in pairs.items()
    }


def _figures(cosines: Tensor) -> dict[str, Any]:
    quantiles = torch.quantile(cosines.double(), torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
    return {
        f"share_above_{ALIKE}": float((cosines > ALIKE).double().mean()),
        "median_cosine": float(cosines.double().quantile(0.5)),
        "quantiles": {str(q): value for q, value in zip(_QUANTILES, quantiles, strict=True)},
    }


def _set_statistics(sae: SelOrthoSAE, statistics: ActivationStatistics) -> None:
    """Set measured means and scales, and weights with which the SAE computes what it did; decoder rows are rescaled."""
    transcoder, weights = sae.config.is_transcoder, {name: p.double() for name, p in sae.named_parameters()}
    mean, scale = sae.input_mean.double(), float(sae.input_scale)
    out_mean, out_scale = (sae.output_mean.double(), float(sae.output_scale)) if transcoder else (mean, scale)
    measured = statistics.mean - statistics.mean.mean() if sae.config.centered else statistics.mean
    sae.set_input_statistics(measured.to(sae.input_mean), statistics.scale)
    if transcoder:
        assert statistics.target_mean is not None
        sae.set_output_statistics(statistics.target_mean.to(sae.output_mean), statistics.target_scale)
    new_scale = float(sae.input_scale)
    new_out = (sae.output_mean, sae.output_scale) if transcoder else (sae.input_mean, sae.input_scale)
    shift, wider = (sae.input_mean.double() - mean) / scale, new_scale / scale
    narrower = out_scale / float(new_out[1])
    b_dec = (weights["b_dec"] * out_scale + out_mean - new_out[0].double()) / float(new_out[1])
    if "W_skip" in weights:
        b_dec += shift @ weights["W_skip"] * narrower
        sae.W_skip.copy_(weights["W_skip"] * (wider * narrower))
    sae.b_dec.copy_(b_dec)
    sae.b_enc.copy_(weights["b_enc"] + shift @ weights["W_enc"])
    sae.W_enc.copy_(weights["W_enc"] * wider)
    sae.W_dec.copy_(weights["W_dec"] * narrower)


def _normalize_rows(sae: SelOrthoSAE, norms: Tensor) -> None:
    """Scale decoder rows of some norms (d_sae,) to 1 and the activations of their features by the norms."""
    kind = sae.config.activation
    if kind in ("topk", "batchtopk") and float(norms.max() / norms.min()) > 1.001:
        logger.warning(
            "decoder rows have norms from %.3g to %.3g and are scaled to 1: %s then keeps other features, those whose "
            "activation times norm is largest, so that the start is not exactly the SAE",
            *(float(norms.min()), float(norms.max()), kind),
        )
    sae.W_enc.copy_(sae.W_enc.double() * norms)
    sae.b_enc.copy_(sae.b_enc.double() * norms)
    sae.W_dec.copy_(sae.W_dec.double() / norms[:, None])
    if kind == "jumprelu":
        sae.log_threshold.add_(norms.log())
    elif kind == "batchtopk":
        sae.threshold.mul_(float(norms.median()))
