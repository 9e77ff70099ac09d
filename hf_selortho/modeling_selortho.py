"""The sparse autoencoder as a transformers model."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .activation_functions import activate
from .configuration_selortho import SelOrthoConfig

try:  # what training and publishing need is not copied to the Hub: it is found in the installed package
    from hf_selortho.errors import SelOrthoError
    from hf_selortho.package_methods import PackageMethods
    from hf_selortho.sparse_ops import DenseFeatures, as_float
    from hf_selortho.training_step import run_step

    PACKAGE_FOUND = True
except ImportError:  # it is missing, or of a version without these
    if __name__.startswith("hf_selortho."):
        raise
    PACKAGE_FOUND = False

    def _missing(method: str) -> Any:
        def needs_package(*args: Any, **kwargs: Any) -> None:
            raise ValueError(f"SelOrthoSAE.{method} needs the package: pip install hf_selortho")

        return needs_package

    class PackageMethods(PreTrainedModel):  # type: ignore[no-redef]
        """Stands for the methods of the package."""

        capture, select_pairs, push_to_hub = map(_missing, ("capture", "select_pairs", "push_to_hub"))

        def _checked(self, value: Tensor, what: str, width: str = "d_in", **_: Any) -> Tensor:
            if value.shape[-1] != (expected := getattr(self.config, width)):
                raise ValueError(f"{what} of shape {tuple(value.shape)}: this SAE has {width}={expected}")
            return value


logger = logging.getLogger(__name__)

# Of a feature's encoder weights at the start. Where L1 has to bring activations down, a smaller norm gets there sooner:
# with relu on Gemma-3-270m, FVU 0.12 at L0 207 after 250 steps instead of 0.15 at 247 (SAELens's 0.1: 0.12 at 209, but
# features of small SAEs die at once). Where the k largest are kept, it leaves more features dead.
ENCODER_NORMS = {"relu": 0.3, "topk": 1.0, "batchtopk": 1.0, "jumprelu": 1.0}


@dataclass
class SelOrthoOutput(ModelOutput):
    """What a [`SelOrthoSAE`] computes on a batch."""

    loss: Tensor | None = None  # scalar, the sum of `losses`; None where the package hf_selortho is not installed
    reconstruction: Tensor | None = None  # (..., d_out), in the space of the raw activations
    feature_acts: Tensor | None = None  # (..., d_sae); None if they were not asked for and are sparse
    losses: dict[str, Tensor] | None = None  # weighted terms: "reconstruction", "l1", "ortho", ...
    pairs: Any = None  # the `Pairs` that the selective penalty acted on, else None
    active: Any = None  # the feature activations as `ActiveFeatures` (B, d_sae), in place of `feature_acts`
    threshold: Tensor | None = None  # batchtopk: the smallest activation that this batch kept

    @property
    def features(self) -> Any:
        """The feature activations in the form that was computed, as `FeatureActivations` (B, d_sae)."""
        if self.active is not None:
            return self.active
        assert self.feature_acts is not None
        return DenseFeatures(self.feature_acts.flatten(0, -2))


class SelOrthoSAE(PackageMethods):
    r"""Sparse autoencoder of language-model activations with selective orthogonality.

    With `x~ = (x - input_mean) / input_scale` (and where the config says `centered`, x less its mean over d_in):

        h     = act(x~ W_enc + b_enc)                                     (eq. 2)
        x^    = (h W_dec + b_dec) * input_scale + input_mean              (eq. 3)
        loss  = mean_B |x~^ - x~|^2 + l1 mean_B |h|_1 + ortho R sum_T c_ij^2     (eq. 7)

    The other activation functions replace the L1 term: topk and batchtopk by an auxiliary loss of dead features,
    jumprelu by the mean L0.

    The rows of `W_dec` are features' directions in activation space, held at norm 1 after every update (eq. 6,
    [`normalize_decoder`]) by an optimiser whose gradient has no component along them ([`project_decoder_gradient`]).

    A transcoder (`config.target`) reads activations x of one site and reconstructs those y of another one, of width
    d_out, with a mean and a scale of their own and, with `config.skip`, a linear map of what it reads:

        y^    = (h W_dec + b_dec + x~ W_skip) * output_scale + output_mean
        loss  = mean_B |y~^ - y~|^2 + ...
    """

    config_class = SelOrthoConfig
    base_model_prefix = "sae"
    main_input_name = "activations"
    _no_split_modules: list[str] = []
    # a mean of norm thousands in bfloat16 would be off by more than the features explain
    _keep_in_fp32_modules_strict = {
        "input_mean", "input_scale", "output_mean", "output_scale", "threshold", "log_threshold"
    }  # fmt: skip

    config: SelOrthoConfig
    input_mean: Tensor
    input_scale: Tensor
    output_mean: Tensor  # only of a transcoder, as output_scale
    output_scale: Tensor
    threshold: Tensor  # only with batchtopk

    def __init__(self, config: SelOrthoConfig) -> None:
        super().__init__(config)
        shapes = config.weight_shapes()
        self.W_enc = nn.Parameter(torch.empty(shapes["W_enc"][::-1]).T)  # stored as [`store_by_feature`] has it
        self.b_enc = nn.Parameter(torch.empty(shapes["b_enc"]))
        self.W_dec = nn.Parameter(torch.empty(shapes["W_dec"]))
        self.b_dec = nn.Parameter(torch.empty(shapes["b_dec"]))
        self.register_buffer("input_mean", torch.zeros(shapes["input_mean"]))
        self.register_buffer("input_scale", torch.ones(shapes["input_scale"]))
        if config.is_transcoder:
            self.register_buffer("output_mean", torch.zeros(shapes["output_mean"]))
            self.register_buffer("output_scale", torch.ones(shapes["output_scale"]))
        if config.skip:
            self.W_skip = nn.Parameter(torch.empty(shapes["W_skip"]))
        if "threshold" in shapes:
            self.register_buffer("threshold", torch.zeros(shapes["threshold"]))  # at inference; estimated in training
        if "log_threshold" in shapes:  # in bfloat16 small updates would be lost
            self.log_threshold = nn.Parameter(torch.empty(shapes["log_threshold"]))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Random unit decoder rows, the encoder a multiple of them, biases and input mean 0, input scale 1.

        Of a transcoder, whose features read and write in different spaces, encoder and decoder directions are drawn
        apart.
        """
        if module is not self:
            return
        # these functions of transformers leave alone what has been loaded
        directions = torch.nn.functional.normalize(torch.randn_like(self.W_dec), dim=1)  # (d_sae, d_out)
        init.copy_(self.W_dec, directions)
        if self.config.is_transcoder:
            directions = torch.nn.functional.normalize(torch.randn_like(self.W_enc.T), dim=1)  # (d_sae, d_in)
            init.zeros_(self.output_mean)
            init.ones_(self.output_scale)
        if self.config.skip:
            init.zeros_(self.W_skip)
        init.copy_(self.W_enc, ENCODER_NORMS[self.config.activation] * directions.T)
        for zero in (self.b_enc, self.b_dec, self.input_mean):
            init.zeros_(zero)
        init.ones_(self.input_scale)
        if self.config.activation == "batchtopk":
            init.zeros_(self.threshold)
        if self.config.activation == "jumprelu":
            init.constant_(self.log_threshold, math.log(self.config.jumprelu_threshold))

    def normalize_input(self, activations: Tensor) -> Tensor:
        """Raw activations (..., d_in) to `(x - input_mean) / input_scale`, in float32 or wider.

        Raises:
            SelOrthoError: the last axis is not `d_in` wide, or they are no floating-point numbers of this device.
        """
        activations = self._checked(activations, "activations")
        x = activations.to(torch.promote_types(activations.dtype, torch.float32))
        return (self.center(x) - self.input_mean) / self.input_scale

    def center(self, activations: Tensor) -> Tensor:
        """Subtract the mean over the last axis of activations (..., d_in) if the SAE is `centered`; else return them.

        That mean is what [`decode`] leaves out. A LayerNorm takes it away, so the language model computes the same.
        """
        return activations - activations.mean(-1, keepdim=True) if self.config.centered else activations

    def encode(self, activations: Tensor) -> Tensor:
        """Compute the feature activations (..., d_sae) of raw language-model activations (..., d_in).

        With batchtopk, what fires does not depend on the batch: it exceeds the threshold estimated in training.

        Raises:
            SelOrthoError: they are no finite floating-point numbers of width d_in on the device of the SAE.
        """
        activations = self._checked(activations, "activations", finite=True)
        z = self.pre_activations(self.normalize_input(activations))
        config = self.config
        return activate(config.activation, z, config.k, self.inference_threshold(), config.jumprelu_bandwidth)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Compute raw activations (..., d_out) from feature activations (..., d_sae), in the dtype of the latter.

        What a transcoder's skip adds is left out, as it is no feature's: see [`reconstruct`].

        Raises:
            SelOrthoError: they are no finite floating-point numbers of width d_sae on the device of the SAE.
        """
        feature_acts = self._checked(feature_acts, "feature activations", "d_sae", finite=True)
        return self._denormalize(feature_acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec).to(feature_acts.dtype)

    def reconstruct(self, activations: Tensor, feature_acts: Tensor | None = None) -> Tensor:
        """Encode raw activations (..., d_in) and decode them again: (..., d_out), a transcoder's skip included.

        Args:
            feature_acts: what [`encode`] gives for these activations, if that is known.

        Raises:
            SelOrthoError: as [`encode`].
        """
        activations = self._checked(activations, "activations")
        y_hat = self.decode(self.encode(activations) if feature_acts is None else feature_acts)
        if self.config.skip:
            added = (self.normalize_input(activations).to(self.W_skip.dtype) @ self.W_skip) * self.output_scale
            y_hat = (y_hat + added).to(y_hat.dtype)
        return self._with_mean(y_hat, activations)

    def forward(
        self,
        activations: Tensor,
        group: Any = None,
        plan: Any = None,
        dead: Tensor | None = None,
        return_feature_acts: bool = True,
        target: Tensor | None = None,
    ) -> SelOrthoOutput:
        """Encode, decode and, where the package hf_selortho is installed, compose the loss of eq. 7.

        Args:
            activations: raw activations of the language model at the hook, (..., d_in).
            group: under data parallel training, the `ProcessGroup` whose tokens form the batch of the penalty.
            plan: the `PenaltyPlan` of this step; default: select pairs and act on them.
            dead: which features are dead (d_sae,), for the auxiliary loss of topk and batchtopk.
            return_feature_acts: False lets a training step work on the active entries alone where these are few:
                the output then has `active` and no `feature_acts`. Loss and gradients are the same.
            target: of a transcoder, the activations that it reconstructs, (..., d_out), of the same tokens.

        Raises:
            SelOrthoError: the activations are not what [`encode`] takes, or hold no token. In training, NaN and
                infinity are not looked for.
        """
        if not PACKAGE_FOUND:
            if self.training:
                logger.warning("no loss is computed: training needs the package, pip install hf_selortho")
            h = self.encode(activations)
            return SelOrthoOutput(reconstruction=self.reconstruct(activations, h), feature_acts=h)
        activations = self._checked(activations, "activations", finite=not self.training)
        if activations.numel() == 0:
            raise SelOrthoError(f"activations of shape {tuple(activations.shape)}: expected at least one token")
        x = self.normalize_input(activations).reshape(-1, activations.shape[-1])  # (B, d_in)
        y = self.normalize_target(activations, target) if self.config.is_transcoder or target is not None else x
        step = run_step(self, x, y, group, plan, dead, dense=return_feature_acts)
        dense = isinstance(step.features, DenseFeatures)
        feature_acts = step.features.values if dense else None
        if feature_acts is not None and activations.ndim != 2:
            feature_acts = feature_acts.view(*activations.shape[:-1], -1)
        x_hat = self._denormalize(step.y_hat).view(*activations.shape[:-1], -1)
        return SelOrthoOutput(
            loss=torch.stack([as_float(term) for term in step.losses.values()]).sum(),
            reconstruction=self._with_mean(x_hat, activations).to(activations.dtype),
            feature_acts=feature_acts,
            losses=step.losses,
            pairs=step.pairs,
            active=None if dense else step.features,
            threshold=step.threshold,
        )

    def pre_activations(self, x: Tensor) -> Tensor:
        """Compute `x W_enc + b_enc` (..., d_sae) of normalised activations (..., d_in)."""
        flat = x.to(self.W_enc.dtype).reshape(-1, x.shape[-1])
        return torch.addmm(self.b_enc, flat, self.W_enc).view(*x.shape[:-1], len(self.b_enc))

    def inference_threshold(self) -> Tensor | None:
        """Return what a pre-activation has to exceed: () with batchtopk, (d_sae,) with jumprelu, else None."""
        if self.config.activation == "jumprelu":
            return self.log_threshold.exp()
        return self.threshold if self.config.activation == "batchtopk" else None

    def _with_mean(self, x_hat: Tensor, activations: Tensor) -> Tensor:
        return x_hat + activations.mean(-1, keepdim=True) if self.config.centered else x_hat

    def _denormalize(self, y_hat: Tensor) -> Tensor:
        y_hat = y_hat.to(torch.promote_types(y_hat.dtype, torch.float32))
        if self.config.is_transcoder:
            return y_hat * self.output_scale + self.output_mean
        return y_hat * self.input_scale + self.input_mean
