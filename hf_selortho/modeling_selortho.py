"""The sparse autoencoder as a transformers model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_selortho import SelOrthoConfig
from .decorrelation import BatchGroup, Pairs, full_penalty, selective_penalty
from .errors import SelOrthoError


@dataclass
class SelOrthoOutput(ModelOutput):
    """What a [`SelOrthoSAE`] computes on a batch."""

    loss: Tensor | None = None  # scalar, the sum of `losses`
    reconstruction: Tensor | None = None  # (..., d_in), in the space of the raw activations
    feature_acts: Tensor | None = None  # (..., d_sae)
    losses: dict[str, Tensor] | None = None  # weighted terms: "reconstruction", "l1", "ortho"
    pairs: Pairs | None = None  # the pairs that the selective penalty acted on, else None


class SelOrthoSAE(PreTrainedModel):
    r"""Sparse autoencoder of language-model activations with selective orthogonality.

    With `x~ = (x - input_mean) / input_scale`:

        h     = act(x~ W_enc + b_enc)                                     (eq. 2)
        x^    = (h W_dec + b_dec) * input_scale + input_mean              (eq. 3)
        loss  = mean_B |x~^ - x~|^2 + l1 mean_B |h|_1 + ortho R sum_T c_ij^2     (eq. 7)

    The rows of `W_dec` are features' directions in activation space, held at norm 1 after every update (eq. 6,
    [`normalize_decoder`]) by an optimiser whose gradient has no component along them ([`project_decoder_gradient`]).
    """

    config_class = SelOrthoConfig
    base_model_prefix = "sae"
    main_input_name = "activations"
    _no_split_modules: list[str] = []
    # a mean of norm thousands in bfloat16 would be off by more than the features explain
    _keep_in_fp32_modules_strict = {"input_mean", "input_scale"}

    config: SelOrthoConfig
    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, config: SelOrthoConfig) -> None:
        super().__init__(config)
        d_in, d_sae = config.d_in, config.d_sae
        assert d_in is not None and d_sae is not None  # the config has checked it
        self.W_enc = nn.Parameter(torch.empty(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.empty(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.empty(d_in))
        self.register_buffer("input_mean", torch.zeros(d_in))
        self.register_buffer("input_scale", torch.ones(()))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Random unit decoder rows, the encoder their transpose, biases and input mean 0, input scale 1."""
        if module is not self:
            return
        # these functions of transformers leave alone what has been loaded
        directions = torch.nn.functional.normalize(torch.randn_like(self.W_dec), dim=1)  # (d_sae, d_in)
        init.copy_(self.W_dec, directions)
        init.copy_(self.W_enc, directions.T)
        for zero in (self.b_enc, self.b_dec, self.input_mean):
            init.zeros_(zero)
        init.ones_(self.input_scale)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load an SAE from a Hub repository or a local folder, from safetensors only.

        Takes the arguments of `PreTrainedModel.from_pretrained` (`revision`, `subfolder`, `dtype`, `device_map`, ...).

        Raises:
            SelOrthoError: the weights are damaged, incomplete or do not fit the configuration.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
            model, info = loaded
        except SafetensorError as error:
            raise SelOrthoError(
                f"{_weights_file(pretrained_model_name_or_path, kwargs)} is damaged or incomplete ({error}); "
                "download it again, or use an earlier checkpoint"
            ) from error
        except RuntimeError as error:
            if "size mismatch" not in str(error) and "mismatched" not in str(error):
                raise
            raise SelOrthoError(
                f"the weights in {pretrained_model_name_or_path} do not fit its config.json (d_in and d_sae give the "
                "shapes of W_enc and W_dec); take both files from the same run"
            ) from error
        wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
        if any(wrong.values()):
            found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
            raise SelOrthoError(f"{pretrained_model_name_or_path} does not hold the weights of a SelOrthoSAE ({found})")
        return (model, info) if wants_info else model

    @torch.no_grad()
    def set_input_statistics(self, mean: Tensor, scale: float) -> None:
        """Set the buffers that turn raw activations into normalised ones: `mean` (d_in,) and a positive `scale`.

        Raises:
            SelOrthoError: the scale is not a positive number, as with constant activations.
        """
        if not (math.isfinite(scale) and scale > 0):
            raise SelOrthoError(f"input scale {scale}: the activations do not vary; check the text and the layer")
        self.input_mean.copy_(mean)
        self.input_scale.fill_(scale)

    def normalize_input(self, activations: Tensor) -> Tensor:
        """Raw activations (..., d_in) to `(x - input_mean) / input_scale`, in float32 or wider.

        Raises:
            SelOrthoError: the last axis is not `d_in` wide.
        """
        if activations.shape[-1] != self.config.d_in:
            config = self.config
            where = f" ({config.lm_name}, {config.hook_name})" if config.lm_name else ""
            raise SelOrthoError(
                f"activations of shape {tuple(activations.shape)}: this SAE reads activations of width "
                f"d_in={config.d_in}{where}"
            )
        x = activations.to(torch.promote_types(activations.dtype, torch.float32))
        return (x - self.input_mean) / self.input_scale

    def encode(self, activations: Tensor) -> Tensor:
        """Feature activations (..., d_sae) of raw language-model activations (..., d_in)."""
        return self._encode_normalized(self.normalize_input(activations))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Raw activations (..., d_in), in the dtype of `feature_acts`, from feature activations (..., d_sae)."""
        return self._denormalize(feature_acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec).to(feature_acts.dtype)

    def forward(self, activations: Tensor, group: BatchGroup | None = None) -> SelOrthoOutput:
        """Encode, decode and compose the loss of eq. 7.

        Args:
            activations: raw activations of the language model at the hook, (..., d_in).
            group: under data parallel training, the processes whose tokens form the batch of the penalty.

        Raises:
            SelOrthoError: the last axis is not `d_in` wide.
        """
        x = self.normalize_input(activations)
        h = self._encode_normalized(x)  # (..., d_sae)
        x_hat = h @ self.W_dec + self.b_dec
        flat = h.reshape(-1, len(self.b_enc))  # (B, d_sae)
        ortho, pairs = self._ortho_loss(flat, group)
        losses = {
            "reconstruction": (x_hat.to(x.dtype) - x).square().sum(-1).mean(),
            "l1": self._l1_loss(flat),
            "ortho": ortho,
        }
        loss = losses["reconstruction"] + losses["l1"] + losses["ortho"]
        reconstruction = self._denormalize(x_hat).to(activations.dtype)
        return SelOrthoOutput(loss=loss, reconstruction=reconstruction, feature_acts=h, losses=losses, pairs=pairs)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to L2 norm 1 (eq. 6)."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove the gradient's component along each decoder row, which [`normalize_decoder`] would undo anyway."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad.addcmul_(along, self.W_dec, value=-1)

    def _encode_normalized(self, x: Tensor) -> Tensor:
        h = torch.relu(x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc)
        if self.config.activation == "topk":
            assert self.config.k is not None  # the config has checked it
            values, indices = h.topk(self.config.k, dim=-1, sorted=False)
            h = torch.zeros_like(h).scatter(-1, indices, values)
        return h

    def _denormalize(self, x_hat: Tensor) -> Tensor:
        return x_hat.to(torch.promote_types(x_hat.dtype, torch.float32)) * self.input_scale + self.input_mean

    def _l1_loss(self, h: Tensor) -> Tensor:
        if self.config.activation != "relu" or self.config.l1_coefficient == 0:
            return h.new_zeros((), dtype=torch.float32)
        return self.config.l1_coefficient * h.float().sum(1).mean()  # h >= 0, so its L1 norm is its sum

    def _ortho_loss(self, h: Tensor, group: BatchGroup | None) -> tuple[Tensor, Pairs | None]:
        cfg = self.config
        if cfg.penalty == "none" or cfg.ortho_coefficient == 0:
            return h.new_zeros((), dtype=torch.float32), None
        if cfg.penalty == "full":
            return full_penalty(h, cfg.ortho_coefficient, cfg.reduction, cfg.min_support, cfg.correlation, group), None
        return selective_penalty(
            h, cfg.pair_fraction, cfg.min_support, cfg.ortho_coefficient, cfg.reduction, cfg.correlation, group
        )


def _weights_file(name_or_path: Any, kwargs: dict[str, Any]) -> str:
    folder = Path(str(name_or_path), kwargs.get("subfolder") or "")
    return str(folder / "model.safetensors") if folder.is_dir() else f"model.safetensors of {name_or_path}"
