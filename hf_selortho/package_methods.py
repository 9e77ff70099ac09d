"""What a `SelOrthoSAE` does only where this package is installed: check arguments, load by name, train, publish."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checks import floats_of, name_of, object_of
from .configuration_selortho import SelOrthoConfig
from .errors import SelOrthoError
from .penalties import select_by_config
from .utils import hub
from .utils.library_errors import one_line, storage_error
from .utils.names import located

ROWS_IN_CACHE = 512  # decoder rows handled at once on a CPU


class PackageMethods(PreTrainedModel):
    """The methods of a [`SelOrthoSAE`] that a copy of its code on the Hub does without."""

    config_class = SelOrthoConfig
    config: SelOrthoConfig
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    input_mean: Tensor
    input_scale: Tensor
    output_mean: Tensor
    output_scale: Tensor
    threshold: Tensor

    @classmethod
    def checked(cls, value: Any) -> Any:
        """Take an SAE; raise a SelOrthoError for anything else, such as the path of one."""
        if isinstance(value, PackageMethods):  # code that was copied to the Hub has a class of its own
            return value
        return object_of(value, cls, "sae", "load it, as with SelOrthoSAE.from_pretrained(name)")

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
        if pretrained_model_name_or_path is None:  # whoever calls has the weights
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        lookup = {key: kwargs.pop(key) for key in hub.LOOKUP if key in kwargs}
        name, lookup = located(name_of(pretrained_model_name_or_path, "the SAE"), lookup)
        lookup = hub.at_one_commit(name, lookup)
        config = kwargs.pop("config", None)
        kind: Any = cls.config_class  # of code that was copied to the Hub, the copy's own
        if not isinstance(config, kind):
            settings = {key: kwargs.pop(key) for key in kind.describe().keys() & kwargs.keys()}
            config = kind.from_pretrained(name if config is None else config, **lookup, **settings)
        files = hub.weight_files(name, lookup, kwargs.get("variant"))
        hub.check_tensors(name, files, config.weight_shapes())  # so that none is missing, to be filled in at random
        kwargs["use_safetensors"] = True
        try:
            loaded: Any = super().from_pretrained(files[0].parent, *args, config=config, **kwargs)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            said = f"cannot load the SAE {name!r}: {one_line(error)}"
            raise storage_error(error) or SelOrthoError(said) from error
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
            SelOrthoError: as `hf_selortho.features.FeatureCapture`.
        """
        features = importlib.import_module("hf_selortho.features")  # of a layer above
        return features.FeatureCapture(self, lm).capture(texts)

    def select_pairs(self, h: Any, group: Any = None) -> Any:
        """Select the `Pairs` that the configured penalty acts on, for feature activations `h` (B, d_sae).

        Raises:
            SelOrthoError: as `hf_selortho.select_pairs`.
        """
        return select_by_config(self.config, h, self.W_dec, group).pairs

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Publish the SAE: weights, config, model card and an export for SAELens, in one commit.

        Takes the arguments of `hf_selortho.hub.push.push_sae` and returns what that does. Evaluation, pictures and the
        facts of the training are in the folder of the run: `hf_selortho.hub.push.push_run` publishes them too.

        Raises:
            SelOrthoError: the Hub does not let it.
        """
        return importlib.import_module("hf_selortho.hub.push").push_sae(self, repo_id, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save weights and config in a folder; with `push_to_hub=True`, publish as [`push_to_hub`] does, too.

        Raises:
            SelOrthoError: `push_to_hub=True` without `repo_id="owner/name"`, or as [`push_to_hub`].
        """
        kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict}
        if not push_to_hub:
            return super().save_pretrained(save_directory, **kwargs)
        if not (repo_id := kwargs.pop("repo_id", None)):
            raise SelOrthoError('push_to_hub=True needs repo_id="owner/name": nothing was saved')
        names = ("private", "revision", "create_pr", "commit_message", "model_id", "dataset_id")
        push = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        if is_main_process:
            self.push_to_hub(repo_id, token=kwargs.get("token"), **push)

    @torch.no_grad()
    def set_input_statistics(self, mean: Tensor, scale: float) -> None:
        """Set the buffers that turn raw activations into normalised ones: `mean` (d_in,) and a positive `scale`.

        Raises:
            SelOrthoError: the scale is not a positive number, as with constant activations, or the mean does not fit.
        """
        self._set_statistics("input", mean, scale, "d_in")

    @torch.no_grad()
    def set_output_statistics(self, mean: Tensor, scale: float) -> None:
        """Set those of what a transcoder reconstructs: `mean` (d_out,) and a positive `scale`.

        Raises:
            SelOrthoError: as [`set_input_statistics`].
        """
        self._set_statistics("output", mean, scale, "d_out")

    def _set_statistics(self, which: str, mean: Tensor, scale: float, width: str) -> None:
        mean = self._checked(floats_of(mean, f"{which} mean", 1, self.W_dec), f"{which} mean", width)
        if not (math.isfinite(scale) and scale > 0):
            raise SelOrthoError(f"{which} scale {scale}: the activations do not vary; check the text and the layer")
        getattr(self, f"{which}_mean").copy_(mean)
        getattr(self, f"{which}_scale").fill_(scale)

    def normalize_target(self, activations: Tensor, target: Tensor | None) -> Tensor:
        """Turn what a transcoder reconstructs (..., d_out) into `(y - output_mean) / output_scale`, (B, d_out).

        Raises:
            SelOrthoError: there is none, it is not of the same tokens as the activations (..., d_in) that are read, or
                this SAE reconstructs what it reads.
        """
        config = self.config
        if not config.is_transcoder:
            raise SelOrthoError("target= is for transcoders: this SAE reconstructs what it reads; leave it out")
        if target is None:
            raise SelOrthoError(
                f"this transcoder reconstructs {config.target}: pass its activations of the same tokens as target="
            )
        y = self._checked(target, "target", "d_out", finite=not self.training)
        if y.shape[:-1] != activations.shape[:-1]:
            raise SelOrthoError(
                f"target of shape {tuple(y.shape)} for activations of shape {tuple(activations.shape)}: expected the "
                "same tokens"
            )
        y = y.to(torch.promote_types(y.dtype, torch.float32)).reshape(-1, y.shape[-1])
        return (y - self.output_mean) / self.output_scale

    def _checked(self, value: Any, what: str, width: str = "d_in", finite: bool = False) -> Tensor:
        """Take floating-point numbers (..., width), as a tensor on the device of the SAE; `width` names a setting.

        Raises:
            SelOrthoError: they are something else.
        """
        tensor, config = floats_of(value, what, like=self.W_dec, finite=finite), self.config
        if tensor.shape[-1] != getattr(config, width):
            where = f" ({config.lm_name}, {config.hook_name})" if config.lm_name else ""
            verb = "reads activations of width" if width == "d_in" else "has"
            raise SelOrthoError(
                f"{what} of shape {tuple(tensor.shape)}: this SAE {verb} {width}={getattr(config, width)}{where}"
            )
        return tensor

    def raw_directions(self, features: Tensor | slice = slice(None)) -> Tensor:
        """Return what an activation of 1 of some features adds to the raw activations: (features, d_out) in float32."""
        scale = self.output_scale if self.config.is_transcoder else self.input_scale
        return (self.W_dec[features].detach().float() * scale).detach()

    @property
    def aux_features(self) -> int:
        """Dead features that explain the residual of a token in the auxiliary loss; 0: the loss has no such term."""
        config = self.config
        if config.activation not in ("topk", "batchtopk") or config.aux_coefficient == 0:
            return 0
        return self.W_enc.shape[0] // 2 if config.aux_k is None else config.aux_k

    @torch.no_grad()
    def update_threshold(self, batch_threshold: Tensor, momentum: float = 0.95) -> None:
        """Let the fixed threshold of batchtopk follow those of the training batches, as an exponential average.

        Over some 20 batches: of a short run, a longer average lags behind and lets fewer than k features fire.
        """
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
