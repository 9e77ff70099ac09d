"""The sparse autoencoder as a transformers model."""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .activation_functions import activate, floats_of, named
from .configuration_selortho import SelOrthoConfig

try:  # what training needs is not copied to the Hub: it is found in the installed package
    from hf_selortho.checks import name_of
    from hf_selortho.errors import SelOrthoError
    from hf_selortho.sparse_ops import DenseFeatures, as_float
    from hf_selortho.training_step import run_step
    from hf_selortho.utils import hub
except ImportError:  # it is missing, or of a version without these
    if __name__.startswith("hf_selortho."):
        raise
    SelOrthoError, run_step, hub = ValueError, None, None  # type: ignore[assignment, misc]
PACKAGE_FOUND: bool = run_step is not None

logger = logging.getLogger(__name__)

ROWS_IN_CACHE = 512  # decoder rows handled at once on a CPU


@dataclass
class SelOrthoOutput(ModelOutput):
    """What a [`SelOrthoSAE`] computes on a batch."""

    loss: Tensor | None = None  # scalar, the sum of `losses`; None where the package hf_selortho is not installed
    reconstruction: Tensor | None = None  # (..., d_in), in the space of the raw activations
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


def _package_module(name: str, method: str) -> Any:
    """Import a module of the layers above at the call: this file also lives on the Hub, without the package."""
    if hub is None:
        raise SelOrthoError(f"SelOrthoSAE.{method} needs the package: pip install hf_selortho")
    return importlib.import_module(f"hf_selortho.{name}")


def weight_shapes(config: SelOrthoConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter and buffer of a [`SelOrthoSAE`], without making one."""
    d_in, d_sae = config.d_in, config.d_sae
    assert d_in is not None and d_sae is not None  # the config has checked it
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in)}
    shapes |= {"b_dec": (d_in,), "input_mean": (d_in,), "input_scale": ()}
    if config.activation == "batchtopk":
        shapes["threshold"] = ()
    if config.activation == "jumprelu":
        shapes["log_threshold"] = (d_sae,)
    return shapes


class SelOrthoSAE(PreTrainedModel):
    r"""Sparse autoencoder of language-model activations with selective orthogonality.

    With `x~ = (x - input_mean) / input_scale` (and where the config says `centered`, x less its mean over d_in):

        h     = act(x~ W_enc + b_enc)                                     (eq. 2)
        x^    = (h W_dec + b_dec) * input_scale + input_mean              (eq. 3)
        loss  = mean_B |x~^ - x~|^2 + l1 mean_B |h|_1 + ortho R sum_T c_ij^2     (eq. 7)

    The other activation functions replace the L1 term: topk and batchtopk by an auxiliary loss of dead features,
    jumprelu by the mean L0.

    The rows of `W_dec` are features' directions in activation space, held at norm 1 after every update (eq. 6,
    [`normalize_decoder`]) by an optimiser whose gradient has no component along them ([`project_decoder_gradient`]).
    """

    config_class = SelOrthoConfig
    base_model_prefix = "sae"
    main_input_name = "activations"
    _no_split_modules: list[str] = []
    # a mean of norm thousands in bfloat16 would be off by more than the features explain
    _keep_in_fp32_modules_strict = {"input_mean", "input_scale", "threshold", "log_threshold"}

    config: SelOrthoConfig
    input_mean: Tensor
    input_scale: Tensor
    threshold: Tensor  # only with batchtopk

    def __init__(self, config: SelOrthoConfig) -> None:
        super().__init__(config)
        shapes = weight_shapes(config)
        self.W_enc = nn.Parameter(torch.empty(shapes["W_enc"][::-1]).T)  # stored as [`store_by_feature`] has it
        self.b_enc = nn.Parameter(torch.empty(shapes["b_enc"]))
        self.W_dec = nn.Parameter(torch.empty(shapes["W_dec"]))
        self.b_dec = nn.Parameter(torch.empty(shapes["b_dec"]))
        self.register_buffer("input_mean", torch.zeros(shapes["input_mean"]))
        self.register_buffer("input_scale", torch.ones(shapes["input_scale"]))
        if "threshold" in shapes:
            self.register_buffer("threshold", torch.zeros(shapes["threshold"]))  # at inference; estimated in training
        if "log_threshold" in shapes:  # in bfloat16 small updates would be lost
            self.log_threshold = nn.Parameter(torch.empty(shapes["log_threshold"]))
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
        if self.config.activation == "batchtopk":
            init.zeros_(self.threshold)
        if self.config.activation == "jumprelu":
            init.constant_(self.log_threshold, math.log(self.config.jumprelu_threshold))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load an SAE from a Hub repository or a local folder, from safetensors only.

        Takes the arguments of `PreTrainedModel.from_pretrained` (`revision`, `subfolder`, `dtype`, `device_map`, ...).
        Names, shapes and dtypes in the files are compared with the configuration before anything is allocated, and no
        code of the folder is run.

        Raises:
            ConfigError: config.json is damaged, or a value in it is not allowed.
            SelOrthoError: there is no such SAE, or its weights are damaged, incomplete or do not fit the configuration.
        """
        if pretrained_model_name_or_path is None or hub is None:  # whoever calls has the weights; without the package
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        lookup = {key: kwargs.pop(key) for key in hub.LOOKUP if key in kwargs}
        name, lookup = hub.located(name_of(pretrained_model_name_or_path, "the SAE"), lookup)
        lookup = hub.at_one_commit(name, lookup)
        config = kwargs.pop("config", None)
        if not isinstance(config, SelOrthoConfig):
            settings = {key: kwargs.pop(key) for key in SelOrthoConfig.describe().keys() & kwargs.keys()}
            config = SelOrthoConfig.from_pretrained(name if config is None else config, **lookup, **settings)
        files = hub.weight_files(name, lookup, kwargs.get("variant"))
        hub.check_tensors(name, files, weight_shapes(config))  # so that none is missing, to be filled in at random
        kwargs["use_safetensors"] = True
        try:
            loaded: Any = super().from_pretrained(files[0].parent, *args, config=config, **kwargs)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            said = f"cannot load the SAE {name!r}: {hub.one_line(error)}"
            raise hub.storage_error(error) or SelOrthoError(said) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.store_by_feature()
        model.name_or_path = model.config.name_or_path = name
        return loaded

    def capture(self, texts: Sequence[str], lm: Any = None) -> Any:
        """Read each text as in training (language model, hook, contexts, BOS): its tokens and feature activations.

        Args:
            texts: any strings.
            lm: another language model than the one of the training, loaded or by name.

        Returns:
            A list of `hf_selortho.features.TokenFeatures`.

        Raises:
            SelOrthoError: as `hf_selortho.features.FeatureCapture`, or the package is not installed.
        """
        return _package_module("features", "capture").FeatureCapture(self, lm).capture(texts)

    def select_pairs(self, h: Any, group: Any = None) -> Any:
        """Select the `Pairs` that the configured penalty acts on, for feature activations `h` (B, d_sae).

        Raises:
            SelOrthoError: as `hf_selortho.select_pairs`, or the package hf_selortho is not installed.
        """
        return _package_module("penalties", "select_pairs").select_by_config(self.config, h, self.W_dec, group).pairs

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Publish the SAE: weights, config, model card and an export for SAELens, in one commit.

        Takes the arguments of `hf_selortho.hub.push.push_sae` and returns what that does. Evaluation, pictures and the
        facts of the training are in the folder of the run: `hf_selortho.hub.push.push_run` publishes them too.

        Raises:
            SelOrthoError: the Hub does not let it, or the package hf_selortho is not installed.
        """
        return _package_module("hub.push", "push_to_hub").push_sae(self, repo_id, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save weights and config in a folder; with `push_to_hub=True`, publish as [`push_to_hub`] does, too."""
        if not push_to_hub or hub is None:
            kwargs["push_to_hub"] = push_to_hub
            return super().save_pretrained(save_directory, *args, **kwargs)
        repo_id = kwargs.pop("repo_id", None) or os.path.basename(save_directory)
        names = ("private", "revision", "create_pr", "commit_message", "model_id", "dataset_id")
        push = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        self.push_to_hub(repo_id, token=kwargs.get("token"), **push)

    @torch.no_grad()
    def set_input_statistics(self, mean: Tensor, scale: float) -> None:
        """Set the buffers that turn raw activations into normalised ones: `mean` (d_in,) and a positive `scale`.

        Raises:
            SelOrthoError: the scale is not a positive number, as with constant activations, or the mean does not fit.
        """
        mean = floats_of(mean, "input mean", axes=1, like=self.input_mean)
        self._check_width(mean, "input mean")
        if not (math.isfinite(scale) and scale > 0):
            raise SelOrthoError(f"input scale {scale}: the activations do not vary; check the text and the layer")
        self.input_mean.copy_(mean)
        self.input_scale.fill_(scale)

    def normalize_input(self, activations: Tensor) -> Tensor:
        """Raw activations (..., d_in) to `(x - input_mean) / input_scale`, in float32 or wider.

        Raises:
            SelOrthoError: the last axis is not `d_in` wide, or they are no floating-point numbers of this device.
        """
        activations = floats_of(activations, "activations", like=self.W_dec)
        self._check_width(activations, "activations")
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
        activations = floats_of(activations, "activations", like=self.W_dec, finite=True)
        z = self.pre_activations(self.normalize_input(activations))
        config = self.config
        return activate(config.activation, z, config.k, self.inference_threshold(), config.jumprelu_bandwidth)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Compute raw activations (..., d_in) from feature activations (..., d_sae), in the dtype of the latter.

        Raises:
            SelOrthoError: they are no finite floating-point numbers of width d_sae on the device of the SAE.
        """
        feature_acts = floats_of(feature_acts, "feature activations", like=self.W_dec, finite=True)
        if feature_acts.shape[-1] != self.config.d_sae:
            raise SelOrthoError(
                f"feature activations of shape {tuple(feature_acts.shape)}: this SAE has d_sae={self.config.d_sae}"
            )
        return self._denormalize(feature_acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec).to(feature_acts.dtype)

    def forward(
        self,
        activations: Tensor,
        group: Any = None,
        plan: Any = None,
        dead: Tensor | None = None,
        return_feature_acts: bool = True,
    ) -> SelOrthoOutput:
        """Encode, decode and, where the package hf_selortho is installed, compose the loss of eq. 7.

        Args:
            activations: raw activations of the language model at the hook, (..., d_in).
            group: under data parallel training, the `ProcessGroup` whose tokens form the batch of the penalty.
            plan: the `PenaltyPlan` of this step; default: select pairs and act on them.
            dead: which features are dead (d_sae,), for the auxiliary loss of topk and batchtopk.
            return_feature_acts: False lets a training step work on the active entries alone where these are few:
                the output then has `active` and no `feature_acts`. Loss and gradients are the same.

        Raises:
            SelOrthoError: the activations are not what [`encode`] takes, or hold no token. In training, NaN and
                infinity are not looked for.
        """
        activations = floats_of(activations, "activations", like=self.W_dec, finite=not self.training)
        if activations.numel() == 0:
            raise SelOrthoError(f"activations of shape {tuple(activations.shape)}: expected at least one token")
        if not PACKAGE_FOUND:
            if self.training:
                logger.warning("no loss is computed: training needs the package, pip install hf_selortho")
            h = self.encode(activations)
            return SelOrthoOutput(reconstruction=self._with_mean(self.decode(h), activations), feature_acts=h)
        x = self.normalize_input(activations).reshape(-1, activations.shape[-1])  # (B, d_in)
        step = run_step(self, x, group, plan, dead, dense=return_feature_acts)
        dense = isinstance(step.features, DenseFeatures)
        feature_acts = step.features.values if dense else None
        if feature_acts is not None and activations.ndim != 2:
            feature_acts = feature_acts.view(*activations.shape[:-1], -1)
        x_hat = self._denormalize(step.x_hat).view(activations.shape)
        return SelOrthoOutput(
            loss=torch.stack([as_float(term) for term in step.losses.values()]).sum(),
            reconstruction=self._with_mean(x_hat, activations).to(activations.dtype),
            feature_acts=feature_acts,
            losses=step.losses,
            pairs=step.pairs,
            active=None if dense else step.features,
            threshold=step.threshold,
        )

    def _check_width(self, activations: Tensor, what: str) -> None:
        config = self.config
        if activations.shape[-1] != config.d_in:
            where = f" ({config.lm_name}, {config.hook_name})" if config.lm_name else ""
            raise SelOrthoError(
                f"{what} of shape {tuple(activations.shape)}: this SAE reads activations of width "
                f"d_in={config.d_in}{where}"
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

    @property
    def aux_features(self) -> int:
        """Dead features that explain the residual of a token in the auxiliary loss; 0: the loss has no such term."""
        config = self.config
        if config.activation not in ("topk", "batchtopk") or config.aux_coefficient == 0:
            return 0
        return self.W_enc.shape[0] // 2 if config.aux_k is None else config.aux_k

    @torch.no_grad()
    def update_threshold(self, batch_threshold: Tensor, momentum: float = 0.99) -> None:
        """Let the fixed threshold of batchtopk follow those of the training batches, as an exponential average."""
        follow = torch.where(self.threshold > 0, self.threshold.lerp(batch_threshold, 1 - momentum), batch_threshold)
        self.threshold.copy_(follow)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to L2 norm 1 (eq. 6)."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    @torch.no_grad()
    def store_by_feature(self) -> None:
        """Keep `W_enc` (d_in, d_sae) feature by feature in memory, the order in which its sparse gradient comes out.

        Every SAE is made and loaded like this: matrix products of another memory order round differently on some CPUs,
        and a saved SAE has to compute what it computed before, bit for bit.
        """
        self.W_enc.data = self.W_enc.data.T.contiguous().T

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove the gradient's component along each decoder row, which [`normalize_decoder`] would undo anyway."""
        gradient, W_dec = self.W_dec.grad, self.W_dec
        if gradient is None:
            return
        # a few rows at a time stay in a CPU's cache and need no copy of the weights
        rows = ROWS_IN_CACHE if W_dec.device.type == "cpu" else len(W_dec)
        for part, directions in zip(gradient.split(rows), W_dec.split(rows), strict=True):
            along = torch.linalg.vecdot(part, directions)[:, None]
            part.addcmul_(along, directions, value=-1)

    def _with_mean(self, x_hat: Tensor, activations: Tensor) -> Tensor:
        return x_hat + activations.mean(-1, keepdim=True) if self.config.centered else x_hat

    def _denormalize(self, x_hat: Tensor) -> Tensor:
        return x_hat.to(torch.promote_types(x_hat.dtype, torch.float32)) * self.input_scale + self.input_mean


def sae_of(value: Any) -> SelOrthoSAE:
    """Take an SAE; raise a SelOrthoError for anything else, such as the path of one."""
    if not isinstance(value, SelOrthoSAE):
        raise SelOrthoError(
            f"sae is {named(value)}: expected a SelOrthoSAE; load it, as with SelOrthoSAE.from_pretrained(name)"
        )
    return value
