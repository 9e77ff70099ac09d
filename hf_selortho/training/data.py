"""Where a run's activations come from: a language model that reads texts while the SAEs train, or a cache on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.activation_cache import ActivationCache
from ..data.buffer import ActivationBuffer
from ..data.cache_batches import CachedBatches, held_out_batches
from ..data.contexts import ContextStream, Cutter, held_out_contexts
from ..data.texts import TextSource, open_documents
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..language_models.contexts import Context
from ..language_models.loading import LanguageModel, check_context_length, find_revision, load_language_model
from ..utils.names import located
from ..utils.privacy import LOCAL_MODEL
from .arguments import DataArguments, TrainingArguments
from .non_finite import NonFinitePolicy

logger = logging.getLogger(__name__)


class LiveData:
    """Batches and held-out contexts from a frozen language model that reads the texts while the SAEs train.

    Attributes:
        source: batches to train on; it takes no memory until its `statistics` are asked for.
        source_device: holds the activations of the source.
        held_out: contexts to evaluate on, in the main process; empty if nothing is evaluated.
        identity: what, besides the provenance, has to be the same for the same activations.
    """

    def __init__(
        self,
        arguments: TrainingArguments,
        layers: Sequence[int],
        accelerator: Accelerator,
        policy: NonFinitePolicy | None = None,
    ) -> None:
        self.arguments, self.accelerator = arguments, accelerator
        self.documents = open_documents(arguments.data)
        with accelerator.local_main_process_first():  # one process a machine downloads or converts it
            self.lm = _load_lm(arguments, accelerator)
        check_context_length(self.lm, arguments.sae.context_length)
        sae, data = arguments.sae, arguments.data
        self.capture = ActivationCapture(
            self.lm, layers, batch_tokens=arguments.model.lm_batch_tokens, site=sae.site, target=sae.target
        )
        self.capture.on_non_finite = None if policy is None else policy.handle_activations
        self.source_device = self.capture.device
        dtype = str(self.lm.model.dtype).removeprefix("torch.")
        self.identity = {"texts": self.documents.fingerprint, "lm_dtype": dtype}
        self._cutter = Cutter(self.lm.tokenizer, sae.context_length, sae.prepend_bos, data.min_tokens)
        samples, self.held_out = arguments.evaluation.eval_samples, list[Context]()
        if accelerator.is_main_process and samples and data.held_out_fraction:  # before it trains, to fail early
            self.held_out += held_out_contexts(self.documents, self._cutter, samples)
        self.source = self.make_source()

    def make_source(self) -> ActivationBuffer:
        """Make this process's part of the buffer, of documents that no other process reads."""
        run, data, sae = self.arguments.run, self.arguments.data, self.arguments.sae
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        stream = ContextStream(self.documents, self._cutter, seed=run.seed, rank=rank, world_size=processes)
        return ActivationBuffer(
            self.capture,
            stream,
            contexts=-(-data.buffer_contexts // processes),
            context_length=sae.context_length,
            batch_size=run.batch_size // processes,
            refresh_every=data.refresh_every,
            reuse=data.buffer_reuse,
            max_norm_ratio=sae.max_norm_ratio,
            seed=run.seed * processes + rank,
        )

    def provenance(self, layer: int) -> dict[str, Any]:
        """Return the fields of an SAE's configuration that say where its activations come from."""
        capture, target = self.capture, {}
        site, goal = capture.sites[layer], capture.target_sites.get(layer)
        if goal is not None:
            target = _target_settings(capture.target_widths[layer], goal.module, goal.side)
        return {
            "d_in": capture.widths[layer],
            "lm_name": self.lm.name,
            "lm_revision": self.lm.revision,
            "hook_name": site.module,
            "hook_side": site.side,
            **target,
            **_text_settings(self.arguments.data, self.documents.revision),
        }

    def evaluation_inputs(self, batch_size: int) -> EvaluationInputs:
        """Return the language model and held-out activations, of which one may be None: see [`evaluate_saes`]."""
        return self.capture, None


class CachedData:
    """Batches and held-out contexts from cached activations; neither the language model nor the texts are needed.

    Given by name (`--model`), the language model is loaded at the end, to measure the loss recovered. Attributes and
    methods are those of [`LiveData`].
    """

    source_device = torch.device("cpu")

    def __init__(
        self, store: ActivationCache, arguments: TrainingArguments, layers: Sequence[int], accelerator: Accelerator
    ) -> None:
        self.store, self.arguments, self.layers, self.accelerator = store, arguments, list(layers), accelerator
        self.identity = {"activations": store.sha256}
        samples = arguments.evaluation.eval_samples
        self.held_out = store.held_out_contexts()[:samples] if accelerator.is_main_process and samples else []
        if "eval_samples" in arguments.given and accelerator.is_main_process and len(self.held_out) < samples:
            logger.warning(
                "%s holds %d held-out contexts, %d were asked for", store.source, len(self.held_out), samples
            )
        self._measures_loss = "model" in arguments.given and bool(
            self.held_out and (arguments.evaluation.eval_ce_samples or arguments.evaluation.probes != "none")
        )
        self._check_model()
        self.source = self.make_source()

    def make_source(self) -> CachedBatches:
        """Make this process's batches; the pool that they are drawn from holds about as much as a buffer would."""
        run, processes = self.arguments.run, self.accelerator.num_processes
        tokens = self.arguments.data.buffer_contexts * self.arguments.sae.context_length
        return CachedBatches(
            self.store,
            self.layers,
            site=self.arguments.sae.site,
            target=self.arguments.sae.target,
            batch_size=run.batch_size // processes,
            pool_tokens=-(-tokens // processes),
            seed=run.seed,
            rank=self.accelerator.process_index,
            processes=processes,
        )

    def provenance(self, layer: int) -> dict[str, Any]:
        manifest, data = self.store.manifest, self.arguments.data
        sae, target = self.arguments.sae, {}
        entry = manifest.layer(layer, sae.site)
        if sae.target:
            goal = manifest.layer(layer, sae.target)
            target = _target_settings(goal.d_in, goal.hook_name, goal.hook_side)
        return {
            "d_in": entry.d_in,
            "lm_name": manifest.lm_name,
            "lm_revision": manifest.lm_revision,
            "hook_name": entry.hook_name,
            "hook_side": entry.hook_side,
            **target,
            **_text_settings(data, data.dataset_revision),
        }

    def evaluation_inputs(self, batch_size: int) -> EvaluationInputs:
        places = {"site": self.arguments.sae.site, "target": self.arguments.sae.target}
        batches = held_out_batches(self.store, self.layers, batch_size, contexts=len(self.held_out), **places)
        if not self._measures_loss:
            return None, batches
        limits = [self.store.manifest.layer(layer, places["site"]).max_norm for layer in self.layers]
        lm = _load_lm(self.arguments, self.accelerator)
        return ActivationCapture(lm, self.layers, limits, self.arguments.model.lm_batch_tokens, **places), batches

    def _check_model(self) -> None:
        """Refuse another language model than that of the activations before the training, not after it."""
        cached, model = self.store.manifest, self.arguments.model
        if "model" not in self.arguments.given:
            return
        revision, unnamed = cached.lm_revision, cached.lm_name == LOCAL_MODEL
        name = located(str(model.model), {}, "model")[0]
        same = name == cached.lm_name or (not os.path.exists(name) and name.lower() == cached.lm_name.lower())
        if unnamed or (self._measures_loss and same):
            revision = find_revision(str(model.model), model.model_revision)
        if revision != cached.lm_revision or not (same or unnamed):
            raise SelOrthoError(
                f"--model {model.model} at revision {revision}: the activations of {self.store.source} are those of "
                f'"{cached.lm_name}" at {cached.lm_revision}; give these as --model and --model_revision to have the '
                "loss recovered measured, or leave --model out"
            )


TrainingData = LiveData | CachedData
EvaluationInputs = tuple[ActivationCapture | None, Iterable[Mapping[int, Tensor | tuple[Tensor, Tensor]]] | None]


def open_store(arguments: TrainingArguments) -> ActivationCache | None:
    """Open the cached activations that the arguments name; their settings take the place of those of the arguments.

    Raises:
        SelOrthoError: the command line contradicts them, or names no layer where there are several.
    """
    if arguments.data.activations is None:
        return None
    store = ActivationCache(arguments.data.activations)
    of_sae = ("context_length", "prepend_bos", "max_norm_ratio")
    of_text = [f.name for f in fields(TextSource) if f.name != "streaming"]
    for group, names in ((arguments.sae, of_sae), (arguments.data, ("min_tokens", *of_text))):
        for name in names:
            given, cached = getattr(group, name), getattr(store.manifest, name)
            typed = name in arguments.given or (name == "dataset_revision" and given and "dataset" in arguments.given)
            if typed and given != cached:
                raise SelOrthoError(
                    f"--{name} {given}: the activations of {store.source} were cached with {cached}; leave it out, or "
                    "cache them again"
                )
            setattr(group, name, cached)
    chosen = {"site", "module"} & arguments.given or arguments.sae.site != "resid_post"
    if not chosen and not arguments.run.init_from and arguments.sae.target != store.manifest.site:
        arguments.sae.site = store.manifest.site
    if not arguments.run.layers and arguments.sae.layer is None:
        if len(layers := store.manifest.layers) > 1:
            raise SelOrthoError(
                f"no layer given: choose --layer, or --layers for several, from {', '.join(map(str, layers))}"
            )
        arguments.sae.layer = layers[0]
    return store


def _target_settings(width: int, hook_name: str, hook_side: str) -> dict[str, Any]:
    return {"d_out": width, "target_hook_name": hook_name, "target_hook_side": hook_side}


def _text_settings(data: DataArguments, revision: str | None) -> dict[str, Any]:
    names = ("dataset", "dataset_config", "text_column", "chat_column", "chat_roles", "separator", "encoding")
    settings = {name: getattr(data, name) for name in (*names, "min_tokens", "held_out_fraction")}
    return {**settings, "dataset_revision": revision, "dataset_split": data.split}


def _load_lm(arguments: TrainingArguments, accelerator: Accelerator) -> LanguageModel:
    model = arguments.model
    return load_language_model(model.model or "", model.model_revision, dtype=model.lm_dtype, device=accelerator.device)
