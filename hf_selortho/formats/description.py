"""What a published SAE is, told by its configs and the headers of its weights, which are read only when asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..utils.hub import check_names, check_shapes
from .plain import PlainSae, config_of, weight_shapes
from .tensor_files import TensorFile

# Names of the tensors by ours; ".T": stored transposed.
LENS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "decoder.bias"}


@dataclass(frozen=True)
class Description:
    r"""An SAE or transcoder as its library stores it. With the factors `s` and `t` of input and output:

    z  = (s x - [b_dec]) W_enc + b_enc
    h  = act(z)             relu, topk, jumprelu, gated or abstopk
    y^ = (h W_dec + b_dec + s x W_skip) / t
    """

    tensors: TensorFile
    names: Mapping[str, str]
    activation: str = "relu"
    k: int | None = None
    threshold: float | None = None  # one for all features, where it is not among the tensors
    log_thresholds: bool = False  # the tensor "threshold" holds logarithms
    subtracts: bool = False  # b_dec from the input
    unit_rows: bool = False  # z is meant for the rows of W_dec scaled to norm 1
    factors: tuple[float, float] = (1.0, 1.0)
    raw: bool = False  # feature activations are those of the raw input: z / s
    widths: tuple[Any, Any] | None = None  # d_in and d_sae of the config
    ignored: Sequence[str] = ()  # tensors that change nothing
    facts: Mapping[str, Any] = field(default_factory=dict)  # settings of SelOrthoConfig that are known
    metadata: Mapping[str, Any] = field(default_factory=dict)  # all that its library says of it, as it is in the file
    folded: Sequence[str] = ()  # what is made part of the weights, in words
    lost: str | None = None  # what is not exact

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors by our names, compared with those in the file.

        Raises:
            SelOrthoError: a tensor is missing, unknown, or of another shape or dtype than the others give.
        """
        headers = {key: header for key, header in self.tensors.headers.items() if key not in self.ignored}
        check_names(name, headers.keys(), [their.removesuffix(".T") for their in self.names.values()])
        target = self.facts.get("target")
        if "W_skip" in self.names and not target:
            raise SelOrthoError(f"{name} is an SAE that copies its input by a skip connection: expected a transcoder")
        d_in, d_sae = self.widths or self._axes(headers, "W_enc")
        d_out = self._axes(headers, "W_dec")[1] if target else d_in
        shapes = weight_shapes(d_in, d_sae, False, name)
        shapes |= {"W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_in, d_out)}
        shapes = {key: shapes.get(key, (d_sae,)) for key in self.names}
        theirs = {}
        for key, their in self.names.items():
            stored, shape = their.removesuffix(".T"), shapes[key]
            one = key == "threshold" and headers[stored][0] in ((), (1,))  # for all features
            theirs[stored] = headers[stored][0] if one else shape[::-1] if their.endswith(".T") else shape
        check_shapes(self.tensors.path, headers, theirs)
        return shapes

    def config(self, name: str) -> SelOrthoConfig:
        """Return the config of the SAE that it becomes, without its weights; raises as [`shapes`]."""
        shapes, both = self.shapes(name), 1 + (self.activation == "abstopk")  # signs
        facts = {key: value for key, value in self.facts.items() if value is not None}
        kind = {"gated": "jumprelu", "abstopk": "topk"}.get(self.activation, self.activation)
        (d_in, d_sae), d_out, skip = shapes["W_enc"], shapes["W_dec"][1], "W_skip" in shapes
        return config_of(facts, kind, d_in=d_in, d_sae=both * d_sae, d_out=d_out, k=self.k, skip=skip)

    def _axes(self, headers: Mapping[str, tuple[tuple[int, ...], str]], key: str) -> tuple[int, int]:
        their = self.names[key]
        shape = headers[their.removesuffix(".T")][0]
        rows, columns = shape if len(shape) == 2 else (0, 0)
        return (columns, rows) if their.endswith(".T") else (rows, columns)

    def _read(self, key: str) -> Tensor | None:
        if key not in self.names:
            return None
        tensor = self.tensors.read(self.names[key].removesuffix(".T"))
        return tensor.T if self.names[key].endswith(".T") else tensor

    @torch.no_grad()
    def plain(self, name: str) -> PlainSae:
        """Read the weights, with all that is around them folded in; what is not folded stays as it is stored.

        Raises:
            SelOrthoError: as [`shapes`], or a factor is no positive number.
        """
        shapes = self.shapes(name)
        if not all(math.isfinite(factor) and factor > 0 for factor in self.factors):
            raise SelOrthoError(f"{name}: factors {self.factors} of the activations: expected positive numbers")
        W_enc, W_dec, b_enc = self._read("W_enc"), self._read("W_dec"), self._read("b_enc")
        assert W_enc is not None and W_dec is not None
        b_dec, W_skip, thresholds = self._read("b_dec"), self._read("W_skip"), self._read("threshold")
        b_dec = W_dec.new_zeros(W_dec.shape[1]) if b_dec is None else b_dec
        if thresholds is not None:
            thresholds = (thresholds.exp() if self.log_thresholds else thresholds).expand(shapes["W_dec"][0])
        if self.activation == "gated":  # the gate is open where z exceeds a threshold
            gain, b_enc, b_gate = self._read("r_mag"), self._read("b_mag"), self._read("b_gate")
            assert gain is not None and b_enc is not None and b_gate is not None
            W_enc, thresholds = W_enc * gain.exp(), (b_enc.double() - gain.double().exp() * b_gate.double()).float()
        assert b_enc is not None
        if (after := self._read("factor")) is not None:  # of each feature, behind the activation function
            W_dec = W_dec * after[:, None]
        s, t = self.factors
        if self.raw:
            b_enc, thresholds = b_enc / s, None if thresholds is None else thresholds / s
            W_dec = W_dec if s == t else W_dec * (s / t)
        elif self.factors != (1, 1):
            W_enc, W_dec = W_enc * s, W_dec / t
        shift, b_dec = b_dec / s if self.subtracts else W_enc.new_zeros(W_enc.shape[0]), b_dec / t
        if self.unit_rows:
            stored = self._read("W_dec") if not self.raw else W_dec  # factors are no part of the norms
            assert stored is not None
            norms = stored.double().norm(dim=1)
            W_enc, b_enc = (W_enc * norms).float(), (b_enc * norms).float()
            W_dec = (W_dec / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).float()
        if self.activation == "abstopk":
            W_enc, W_dec, b_enc = torch.cat([W_enc, -W_enc], 1), torch.cat([W_dec, -W_dec]), torch.cat([b_enc, -b_enc])
        if self.threshold is not None:
            thresholds = torch.full((W_dec.shape[0],), self.threshold)
        return PlainSae(
            W_enc=W_enc,
            b_enc=b_enc,
            W_dec=W_dec,
            b_dec=b_dec,
            shift=shift,
            threshold=thresholds,
            k=self.k,
            W_skip=None if W_skip is None else W_skip * (s / t),
            facts={key: value for key, value in self.facts.items() if value is not None},
            metadata=self.metadata,
        )


def factors_of_one(tensors: TensorFile, key: str = "scaling_factor") -> list[str]:
    """Return the name of a tensor of factors if all are 1, so that it changes nothing; else nothing."""
    return [key] if key in tensors.headers and bool((tensors.read(key) == 1).all()) else []
