"""The sparse autoencoder as a transformers model."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .activation_functions import ActivationFunction, Encoded
from .baselines import ortsae_penalty
from .batch_group import BatchGroup
from .configuration_selortho import SelOrthoConfig
from .decorrelation import full_penalty, penalty_by_space, penalty_of_selection, select_by_score
from .errors import SelOrthoError
from .pair_selection import Pairs
from .saved_files import LOOKUP, at_one_commit, read_weights
from .sparse_ops import ActiveFeatures, sparse_decode

ROWS_IN_CACHE = 512  # decoder rows handled at once on a CPU


@dataclass
class SelOrthoOutput(ModelOutput):
    """What a [`SelOrthoSAE`] computes on a batch."""

    loss: Tensor | None = None  # scalar, the sum of `losses`
    reconstruction: Tensor | None = None  # (..., d_in), in the space of the raw activations
    feature_acts: Tensor | None = None  # (..., d_sae); None if they were not asked for and are sparse
    losses: dict[str, Tensor] | None = None  # weighted terms: "reconstruction", "l1", "ortho", ...
    pairs: Pairs | None = None  # the pairs that the selective penalty acted on, else None
    active: ActiveFeatures | None = None  # the feature activations as entries (B, d_sae), in place of `feature_acts`
    threshold: Tensor | None = None  # batchtopk: the smallest activation that this batch kept

    @property
    def features(self) -> Tensor | ActiveFeatures:
        """The feature activations in the form that was computed, (B, d_sae)."""
        if self.active is not None:
            return self.active
        assert self.feature_acts is not None
        return self.feature_acts.flatten(0, -2)


@dataclass(frozen=True)
class PenaltyPlan:
    """What the decorrelation penalty does at one step."""

    acts: bool = True
    pairs: Pairs | None = None  # the pairs to act on; None: select them on this batch
    weight: float = 1.0  # with penalty_schedule "on_selection", the number of steps that this one stands for
    coefficient: float | None = None  # in place of the config's ortho_coefficient, when it is steered
    seed: int = 0  # of the chunks of ortsae
    select: Callable[[Tensor | ActiveFeatures], Pairs] | None = None  # in place of the model's own selection


def _package_module(name: str, method: str) -> Any:
    """A module of the layers above, for a method that users look for here.

    By name and at the call: this file also lives on the Hub, without the package.
    """
    try:
        return importlib.import_module(f"hf_selortho.{name}")
    except ModuleNotFoundError as error:
        if error.name != "hf_selortho":
            raise
        raise SelOrthoError(f"SelOrthoSAE.{method} needs the package: pip install hf_selortho") from error


def weight_shapes(config: SelOrthoConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter and buffer of a [`SelOrthoSAE`], without making one."""
    d_in, d_sae = config.d_in, config.d_sae
    assert d_in is not None and d_sae is not None  # the config has checked it
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "input_mean": (d_in,),
        "input_scale": (),
    }
    if config.activation == "batchtopk":
        shapes["threshold"] = ()
    if config.activation == "jumprelu":
        shapes["log_threshold"] = (d_sae,)
    return shapes


class SelOrthoSAE(PreTrainedModel):
    r"""Sparse autoencoder of language-model activations with selective orthogonality.

    With `x~ = (x - input_mean) / input_scale`:

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
        self.function = ActivationFunction(config.activation, config.k, config.jumprelu_bandwidth)
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
        Nothing is allocated before names, shapes and dtypes in the files are known to be those of the configuration,
        no other file of the folder is looked at, and no code of it is run.

        Raises:
            ConfigError: config.json is damaged, or a value in it is not allowed.
            SelOrthoError: there is no such SAE, or its weights are damaged, incomplete or do not fit the configuration.
        """
        if pretrained_model_name_or_path is None:  # whoever calls has the weights: nothing is read
            return super().from_pretrained(None, *args, **kwargs)
        name = os.fspath(pretrained_model_name_or_path)
        lookup = at_one_commit(name, {key: kwargs.pop(key) for key in LOOKUP if key in kwargs})
        config, variant = kwargs.pop("config", None), kwargs.pop("variant", None)
        if not isinstance(config, SelOrthoConfig):
            declared = {f.name for f in fields(SelOrthoConfig)} - {"dtype"}  # an argument of the model too
            settings = {key: kwargs.pop(key) for key in declared & kwargs.keys()}
            config = SelOrthoConfig.from_pretrained(name if config is None else config, **lookup, **settings)
        tensors = read_weights(name, weight_shapes(config), lookup, variant)
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            None, *args, config=config, state_dict=tensors, output_loading_info=True, **kwargs
        )
        model, info = loaded
        model.store_by_feature()
        model.name_or_path = model.config.name_or_path = name
        return (model, info) if wants_info else model

    def capture(self, texts: Sequence[str], lm: Any = None) -> Any:
        """Tokens and feature activations of each text, read as in training: language model, hook, contexts, BOS.

        Args:
            texts: any strings.
            lm: another language model than the one of the training, loaded or by name.

        Returns:
            A list of `hf_selortho.features.TokenFeatures`.

        Raises:
            SelOrthoError: as `hf_selortho.features.FeatureCapture`, or this class has been copied out of its package.
        """
        return _package_module("features", "capture").FeatureCapture(self, lm).capture(texts)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Publish the SAE: weights, config, model card and an export for SAELens, in one commit.

        Takes the arguments of `hf_selortho.hub.push.push_sae` and returns what that does. Evaluation, pictures and the
        facts of the training are in the folder of the run: `hf_selortho.hub.push.push_run` publishes them too.

        Raises:
            SelOrthoError: the Hub does not let it, or this class has been copied out of its package.
        """
        return _package_module("hub.push", "push_to_hub").push_sae(self, repo_id, **kwargs)

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
        """Feature activations (..., d_sae) of raw language-model activations (..., d_in).

        With batchtopk, what fires does not depend on the batch: it exceeds the threshold estimated in training.
        """
        h = self._dense(self.normalize_input(activations)).h
        assert isinstance(h, Tensor)
        return h

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Raw activations (..., d_in), in the dtype of `feature_acts`, from feature activations (..., d_sae)."""
        return self._denormalize(feature_acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec).to(feature_acts.dtype)

    def forward(
        self,
        activations: Tensor,
        group: BatchGroup | None = None,
        plan: PenaltyPlan | None = None,
        dead: Tensor | None = None,
        return_feature_acts: bool = True,
    ) -> SelOrthoOutput:
        """Encode, decode and compose the loss of eq. 7.

        Args:
            activations: raw activations of the language model at the hook, (..., d_in).
            group: under data parallel training, the processes whose tokens form the batch of the penalty.
            plan: what the penalty does at this step; default: select pairs and act on them.
            dead: which features are dead (d_sae,), for the auxiliary loss of topk and batchtopk.
            return_feature_acts: False lets a training step work on the active entries alone where these are few:
                the output then has `active` and no `feature_acts`. Loss and gradients are the same.

        Raises:
            SelOrthoError: the last axis is not `d_in` wide.
        """
        x = self.normalize_input(activations)
        flat = x.reshape(-1, x.shape[-1])  # (B, d_in)
        encoded = None
        if not return_feature_acts and self.training and torch.is_grad_enabled() and not x.requires_grad:
            encoded = self.function.active(flat, self.W_enc, self.b_enc, self._thresholds(), group)
        if encoded is None:
            encoded = self._dense(flat, batch=self.training, group=group)
        x_hat, reconstruction_loss = self._reconstruct(flat, encoded.h)
        ortho, pairs = self._ortho_loss(encoded.h, group, plan or PenaltyPlan())
        losses = {"reconstruction": reconstruction_loss, **self._sparsity_losses(encoded), "ortho": ortho}
        if dead is not None and self._aux_k > 0:
            losses["aux"] = self._aux_loss(flat, flat - x_hat.detach(), dead)
        reconstruction = self._denormalize(x_hat).to(activations.dtype).view(activations.shape)
        active, feature_acts = (encoded.h, None) if isinstance(encoded.h, ActiveFeatures) else (None, encoded.h)
        if feature_acts is not None and activations.ndim != 2:
            feature_acts = feature_acts.view(*activations.shape[:-1], -1)
        return SelOrthoOutput(
            loss=torch.stack([term.float() if term.dtype != torch.float64 else term for term in losses.values()]).sum(),
            reconstruction=reconstruction,
            feature_acts=feature_acts,
            losses=losses,
            pairs=pairs,
            active=active,
            threshold=encoded.threshold,
        )

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

    def _thresholds(self) -> Tensor | None:
        return self.log_threshold.exp() if self.config.activation == "jumprelu" else None

    def _dense(self, x: Tensor, batch: bool = False, group: BatchGroup | None = None) -> Encoded:
        """Feature activations (..., d_sae) of normalised activations (..., d_in)."""
        flat = x.to(self.W_enc.dtype).reshape(-1, x.shape[-1])
        z = torch.addmm(self.b_enc, flat, self.W_enc).view(*x.shape[:-1], -1)
        threshold = self.threshold if self.config.activation == "batchtopk" else self._thresholds()
        return self.function.dense(z, threshold, batch=batch, group=group)

    def _reconstruct(self, x: Tensor, h: Tensor | ActiveFeatures) -> tuple[Tensor, Tensor]:
        """Normalised reconstruction (B, d_in) and its loss, the mean over the prefixes of a Matryoshka SAE."""
        prefixes = self.config.matryoshka_prefixes
        if prefixes is None:
            product = sparse_decode(h, self.W_dec) if isinstance(h, ActiveFeatures) else h @ self.W_dec
            x_hat = product + self.b_dec
            return x_hat, (x_hat.to(x.dtype) - x).square().sum(-1).mean()
        if isinstance(h, ActiveFeatures):
            parts = sparse_decode(h, self.W_dec, torch.tensor(prefixes, device=x.device))  # (B, prefixes, d_in)
        else:
            bounds = zip([0, *prefixes], prefixes, strict=False)
            parts = torch.stack([h[:, a:b] @ self.W_dec[a:b] for a, b in bounds], dim=1)
        nested = parts.cumsum(1) + self.b_dec
        return nested[:, -1], (nested.to(x.dtype) - x[:, None]).square().sum(-1).mean()

    def _denormalize(self, x_hat: Tensor) -> Tensor:
        return x_hat.to(torch.promote_types(x_hat.dtype, torch.float32)) * self.input_scale + self.input_mean

    def _sparsity_losses(self, encoded: Encoded) -> dict[str, Tensor]:
        cfg, h = self.config, encoded.h
        values, tokens = (h.values, h.tokens) if isinstance(h, ActiveFeatures) else (h, len(h))
        zero = values.new_zeros((), dtype=torch.float32)
        if encoded.l0 is not None:
            return {"l1": zero, "l0_penalty": cfg.l0_coefficient * encoded.l0}
        if cfg.activation != "relu" or cfg.l1_coefficient == 0:
            return {"l1": zero}
        return {"l1": cfg.l1_coefficient * values.float().sum() / tokens}  # h >= 0, so its L1 norm is its sum

    @property
    def revives_dead_features(self) -> bool:
        """Whether the loss has a term for dead features, so that [`forward`] wants to know them."""
        return self._aux_k > 0

    @torch.no_grad()
    def update_threshold(self, batch_threshold: Tensor, momentum: float = 0.99) -> None:
        """Let the fixed threshold of batchtopk follow those of the training batches, as an exponential average."""
        follow = torch.where(self.threshold > 0, self.threshold.lerp(batch_threshold, 1 - momentum), batch_threshold)
        self.threshold.copy_(follow)

    @property
    def _aux_k(self) -> int:
        cfg = self.config
        if cfg.activation not in ("topk", "batchtopk") or cfg.aux_coefficient == 0:
            return 0
        return self.W_enc.shape[0] // 2 if cfg.aux_k is None else cfg.aux_k

    def _aux_loss(self, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """Gao et al. 2024, section A.2: the dead features with the largest pre-activations explain the residual."""
        features = dead.nonzero()[:, 0]
        if len(features) == 0:
            return x.new_zeros(())
        z = x.to(self.W_enc.dtype) @ self.W_enc[:, features] + self.b_enc[features]  # (B, dead)
        if len(features) > self._aux_k:
            least = z.detach().topk(self._aux_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
            z = torch.where(z >= least, z, 0)
        explained = torch.relu(z) @ self.W_dec[features]
        return self.config.aux_coefficient * (explained.to(x.dtype) - residual).square().sum(-1).mean()

    def _ortho_loss(
        self, h: Tensor | ActiveFeatures, group: BatchGroup | None, plan: PenaltyPlan
    ) -> tuple[Tensor, Pairs | None]:
        cfg = self.config
        coefficient = (cfg.ortho_coefficient if plan.coefficient is None else plan.coefficient) * plan.weight
        if cfg.penalty == "none" or coefficient == 0 or not plan.acts:
            return self.b_dec.new_zeros((), dtype=torch.float32), plan.pairs
        if cfg.penalty == "ortsae":
            return ortsae_penalty(self.W_dec, coefficient, cfg.ortsae_chunk, plan.seed), None
        if cfg.penalty == "full":
            dense = h.to_dense() if isinstance(h, ActiveFeatures) else h
            return full_penalty(dense, coefficient, cfg.reduction, cfg.min_support, cfg.correlation, group), None
        pairs, fresh = plan.pairs, plan.pairs is None
        if pairs is None:
            pairs = self.select_pairs(h, group) if plan.select is None else plan.select(h.detach())
        if fresh and cfg.penalty_space == "activation" and pairs.source is not None:
            loss = penalty_of_selection(h, pairs, coefficient, cfg.reduction, group)
        else:
            loss = penalty_by_space(
                cfg.penalty_space, h, self.W_dec, pairs, coefficient, cfg.reduction, cfg.correlation, group
            )
        if cfg.decoder_ratio > 0:
            loss = loss + self._alike_loss(h, coefficient * cfg.decoder_ratio, plan.seed)
        return loss, pairs

    def _alike_loss(self, h: Tensor | ActiveFeatures, coefficient: float, seed: int) -> Tensor:
        """Squared decoder cosines of pairs whose directions are alike, the same on every process."""
        if self.config.decoder_pairs == "nearest":
            return ortsae_penalty(self.W_dec, coefficient, self.config.ortsae_chunk, seed)
        alike = select_by_score("decoder", h, self.W_dec.detach(), self.config.pair_fraction)
        return penalty_by_space("decoder", h, self.W_dec, alike, coefficient, self.config.reduction)

    @torch.no_grad()
    def select_pairs(self, h: Tensor | ActiveFeatures, group: BatchGroup | None = None) -> Pairs:
        """The pairs that the configured penalty acts on, for feature activations `h` (B, d_sae)."""
        cfg = self.config
        return select_by_score(
            cfg.selects_by,
            h,
            self.W_dec,
            cfg.pair_fraction,
            cfg.min_support,
            cfg.correlation,
            "auto",
            group,
            cfg.correlation_threshold,
        )
