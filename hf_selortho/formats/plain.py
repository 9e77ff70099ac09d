"""The form between all formats: the tensors of an SAE of raw activations, and where it reads them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlainSae:
    r"""An SAE without normalisation of its input.

        h  = act((x - shift) W_enc + b_enc)
        x^ = h W_dec + b_dec

    where `act` is relu; with `k`, relu of the k largest; with `threshold`, z where z > threshold and z > 0. A
    transcoder (`facts["target"]`) reconstructs another site, y^ = h W_dec + b_dec (+ (x - shift) W_skip).
    """

    W_enc: Tensor  # (d_in, d_sae)
    b_enc: Tensor  # (d_sae,)
    W_dec: Tensor  # (d_sae, d_out)
    b_dec: Tensor  # (d_out,)
    shift: Tensor  # (d_in,), b_dec or zeros; of a transcoder, zeros
    threshold: Tensor | None = None  # (d_sae,)
    k: int | None = None
    W_skip: Tensor | None = None  # (d_in, d_out), only of a transcoder
    facts: Mapping[str, Any] = field(default_factory=dict)  # settings of SelOrthoConfig that are known
    metadata: Mapping[str, Any] = field(default_factory=dict)  # all that its library says of it, as it is in the file

    def to_model(self, name: str) -> SelOrthoSAE:
        """Make it an SAE of ours, in float32; encode and decode compute the same, but for rounding.

        Args:
            name: where it comes from, for messages.

        Raises:
            SelOrthoError: a tensor holds NaN or infinity, or `k` is not possible.
        """
        for key in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip"):
            tensor = getattr(self, key)
            if tensor is not None and not torch.isfinite(tensor).all():
                raise SelOrthoError(f"{name}: {key} holds NaN or infinity: download it again, or choose another SAE")
        d_in, d_sae = self.W_enc.shape
        kind = "topk" if self.k is not None else "relu" if self.threshold is None else "jumprelu"
        skip = self.W_skip is not None
        config = config_of(self.facts, kind, d_in=d_in, d_sae=d_sae, d_out=self.W_dec.shape[1], k=self.k, skip=skip)
        with torch.device("meta"):  # nothing at random, which would be another copy
            sae = SelOrthoSAE(config)
        sae.to_empty(device="cpu")
        with torch.no_grad():
            for key, buffer in sae.named_buffers():
                buffer.fill_(1 if key.endswith("scale") else 0)
            sae.input_mean.copy_(self.shift)  # ours is added to the output again: that is what b_dec does there
            sae.W_enc.copy_(self.W_enc)
            sae.b_enc.copy_(self.b_enc)
            sae.W_dec.copy_(self.W_dec)
            # of a transcoder nothing is added to the output, and the shift, if any, is of the input alone
            sae.b_dec.copy_(self.b_dec if sae.config.is_transcoder else self.b_dec.double() - self.shift.double())
            if self.W_skip is not None:
                sae.W_skip.copy_(self.W_skip)
            if self.threshold is not None:
                # below zero, relu leaves nothing anyway; log 0 is minus infinity, exp of it 0
                sae.log_threshold.copy_(self.threshold.clamp(min=0).double().log())
        if sae.config.layer_of_site is None:
            logger.warning(
                "%s does not say that it reads a site that is known here%s: encode and decode work on activations of "
                "yours; what needs the language model does not",
                name,
                f", but {sae.config.hook_name}" if sae.config.hook_name else "",
            )
        return sae.eval()

    @staticmethod
    @torch.no_grad()
    def of(sae: SelOrthoSAE) -> PlainSae:
        """Take one of ours, with the input normalisation folded into the weights, in float32.

        With m = input_mean and s = input_scale: W_enc / s, b_enc + b_dec W_enc, W_dec s and b_dec s + m, which is
        subtracted from the input first. So large means cancel before the product, and no digits are lost. Of a
        transcoder, whose libraries subtract nothing, m goes into b_enc and, with a skip, into b_dec.
        """
        if sae.config.is_transcoder:
            return PlainSae._of_transcoder(sae)
        m, s = sae.input_mean.double(), sae.input_scale.double()
        W_enc, b_dec = sae.W_enc.double(), sae.b_dec.double()
        bias = (b_dec * s + m).float()
        config, threshold = sae.config, None
        if config.activation == "batchtopk":
            threshold = sae.threshold.float().expand(W_enc.shape[1]).contiguous()
        elif config.activation == "jumprelu":
            threshold = sae.log_threshold.float().exp()
        return PlainSae(
            W_enc=(W_enc / s).float().contiguous(),
            b_enc=(sae.b_enc.double() + b_dec @ W_enc).float(),
            W_dec=(sae.W_dec.double() * s).float().contiguous(),
            b_dec=bias,
            shift=bias,
            threshold=threshold,
            k=config.k if config.activation == "topk" else None,
        )

    @staticmethod
    def _of_transcoder(sae: SelOrthoSAE) -> PlainSae:
        m, s = sae.input_mean.double(), sae.input_scale.double()
        m_out, s_out = sae.output_mean.double(), sae.output_scale.double()
        W_enc, b_dec, W_skip = sae.W_enc.double() / s, sae.b_dec.double() * s_out + m_out, None
        if sae.config.skip:
            W_skip = sae.W_skip.double() / s * s_out
            b_dec = b_dec - m @ W_skip
        threshold = sae.inference_threshold()
        return PlainSae(
            W_enc=W_enc.float().contiguous(),
            b_enc=(sae.b_enc.double() - m @ W_enc).float(),
            W_dec=(sae.W_dec.double() * s_out).float().contiguous(),
            b_dec=b_dec.float(),
            shift=torch.zeros_like(sae.input_mean),
            threshold=None if threshold is None else threshold.float().expand(W_enc.shape[1]).contiguous(),
            k=sae.config.k if sae.config.activation == "topk" else None,
            W_skip=None if W_skip is None else W_skip.float().contiguous(),
        )


def config_of(facts: Mapping[str, Any], activation: str, *, d_out: int, skip: bool, **widths: Any) -> SelOrthoConfig:
    """Return the config of an SAE of another library; `facts` are what is known of its settings."""
    settings: dict[str, Any] = {"penalty": "none", "input_normalization": "none", "activation": activation}
    settings |= {**widths, **facts} | ({"d_out": d_out, "skip": skip} if facts.get("target") else {})
    return SelOrthoConfig(**settings)


def checked_k(k: Any, name: str) -> int:
    """Return the number of active features per token; raise a SelOrthoError if it is none."""
    if type(k) is not int or k < 1:
        raise SelOrthoError(f"{name}: k={k!r:.50}, expected the number of active features per token")
    return k


def weight_shapes(d_in: Any, d_sae: Any, threshold: bool, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a PlainSae by their usual names.

    Raises:
        SelOrthoError: a width is not a positive whole number.
    """
    for key, value in (("d_in", d_in), ("d_sae", d_sae)):
        if type(value) is not int or not 1 <= value < 1 << 40:
            raise SelOrthoError(f"{name}: {key}={value!r:.50}, expected a positive whole number: is this an SAE?")
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,)}
    shapes |= {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    return shapes | ({"threshold": (d_sae,)} if threshold else {})
