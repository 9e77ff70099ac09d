"""Where a run's activations come from: a language model that reads texts while the SAEs train, or a cache on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.activation_cache import ActivationCache
from ..data.buffer import ActivationBuffer, ActivationStatistics
from ..data.cache_batches import CachedBatches, check_layers, held_out_batches
from ..data.contexts import ContextStream, Cutter, held_out_contexts
from ..data.texts import open_documents
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..language_models.loading import LanguageModel, check_context_length, find_revision, load_language_model
from .arguments import TrainingArguments

# Arguments that cached activations decide: their group, and where the manifest has them.
_CACHED = {
    "context_length": ("sae", "contexts", "context_length"),
    "prepend_bos": ("sae", "contexts", "prepend_bos"),
    "max_norm_ratio": ("sae", "max_norm_ratio"),
    "min_tokens": ("data", "contexts", "min_tokens"),
    "dataset": ("data", "text", "dataset"),
    "dataset_config": ("data", "text", "config"),
    "dataset_revision": ("data", "text", "revision"),
    "split": ("data", "text", "split"),
    "text_column": ("data", "text", "text_column"),
    "held_out_fraction": ("data", "text", "held_out_fraction"),
}


class LiveData:
    """Batches and held-out contexts from a frozen language model that reads the texts while the SAEs train.

    Attributes:
        source: batches to train on; it takes no memory until [`statistics`] fills it.
        source_device: holds the activations of the source.
        held_out: contexts to evaluate on, in the main process; empty if nothing is evaluated.
    """

    def __init__(self, arguments: TrainingArguments, layers: Sequence[int], accelerator: Accelerator) -> None:
        self.arguments, self.accelerator = arguments, accelerator
        self.documents = open_documents(arguments.data.source())
        model = arguments.model
        with accelerator.local_main_process_first():  # one process a machine downloads or converts it
            self.lm = _load_lm(arguments, accelerator)
        check_context_length(self.lm, arguments.sae.context_length)
        self.capture = ActivationCapture(self.lm, layers, batch_tokens=model.lm_batch_tokens)
        self.source_device = self.capture.device
        sae, min_tokens = arguments.sae, arguments.data.min_tokens
        self._cutter = Cutter(self.lm.tokenizer, sae.context_length, sae.prepend_bos, min_tokens)
        samples = arguments.evaluation.eval_samples if arguments.data.held_out_fraction else 0
        self.held_out = (  # found before the training, to fail early
            list(held_out_contexts(self.documents, self._cutter, samples))
            if accelerator.is_main_process and samples
            else []
        )
        self.source = self.make_source(arguments.data.buffer_contexts, arguments.data.refresh_every)

    def make_source(self, buffer_contexts: int, refresh_every: int) -> ActivationBuffer:
        """Make this process's part of a buffer of so many contexts, of documents that no other process reads."""
        run = self.arguments.run
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        stream = ContextStream(self.documents, self._cutter, seed=run.seed, rank=rank, world_size=processes)
        return ActivationBuffer(
            self.capture,
            stream,
            contexts=-(-buffer_contexts // processes),
            context_length=self.arguments.sae.context_length,
            batch_size=run.batch_size // processes,
            refresh_every=refresh_every,
            reuse=self.arguments.data.buffer_reuse,
            max_norm_ratio=self.arguments.sae.max_norm_ratio,
            seed=run.seed * processes + rank,
        )

    def statistics(self, progress: bool) -> dict[int, ActivationStatistics]:
        """Fill the buffer; returns mean, scale and sink threshold of each layer."""
        return self.source.fill(progress)

    def provenance(self, layer: int) -> dict[str, Any]:
        """Return the fields of an SAE's configuration that say where its activations come from."""
        return {
            "d_in": self.lm.d_model,
            "lm_name": self.lm.name,
            "lm_revision": self.lm.revision,
            "hook_name": self.capture.sites[layer].module,
            "dataset": self.documents.name,
            "dataset_revision": self.documents.revision,
            "dataset_split": self.documents.split,
            **_text_settings(self.arguments),
        }

    def identity(self) -> dict[str, Any]:
        """Return what, besides the provenance, has to be the same for the same activations."""
        dtype = str(self.lm.model.dtype).removeprefix("torch.")
        return {"texts": self.documents.fingerprint, "lm_dtype": dtype}

    def evaluation_capture(self) -> ActivationCapture | None:
        """Return the language model at the layers of the run; None if it is not to be had."""
        return self.capture

    def held_out_batches(self, batch_size: int) -> Iterable[Mapping[int, Tensor]] | None:
        """Return held-out activations; None: the language model of `evaluation_capture` has to compute them."""
        return None


class CachedData:
    """Batches and held-out contexts from cached activations; neither the language model nor the texts are needed.

    Given by name (`--model`), the language model is loaded at the end, to measure the loss recovered. Attributes and
    methods are those of [`LiveData`].
    """

    def __init__(
        self, store: ActivationCache, arguments: TrainingArguments, layers: Sequence[int], accelerator: Accelerator
    ) -> None:
        self.store, self.arguments, self.layers, self.accelerator = store, arguments, list(layers), accelerator
        self.source_device = torch.device("cpu")
        samples = arguments.evaluation.eval_samples
        self.held_out = store.held_out_contexts()[:samples] if accelerator.is_main_process and samples else []
        self._measures_loss = bool("model" in arguments.given and arguments.evaluation.eval_ce_samples and samples)
        self._check_model()
        self.source = self.make_source(arguments.data.buffer_contexts, arguments.data.refresh_every)

    def make_source(self, buffer_contexts: int, refresh_every: int) -> CachedBatches:
        """Make this process's batches; the pool that they are drawn from holds about so many contexts."""
        processes = self.accelerator.num_processes
        return CachedBatches(
            self.store,
            self.layers,
            batch_size=self.arguments.run.batch_size // processes,
            pool_tokens=-(-buffer_contexts * self.arguments.sae.context_length // processes),
            seed=self.arguments.run.seed,
            rank=self.accelerator.process_index,
            processes=processes,
        )

    def statistics(self, progress: bool) -> dict[int, ActivationStatistics]:
        return self.source.statistics()

    def provenance(self, layer: int) -> dict[str, Any]:
        entry, model = self.store.manifest.layer(layer), self.store.manifest.model
        data = self.arguments.data  # which `open_store` has taken from the manifest
        return {
            "d_in": entry.d_in,
            "lm_name": model.name,
            "lm_revision": model.revision,
            "hook_name": entry.hook_name,
            "dataset": data.dataset,
            "dataset_revision": data.dataset_revision,
            "dataset_split": data.split,
            **_text_settings(self.arguments),
        }

    def identity(self) -> dict[str, Any]:
        return {"activations": self.store.sha256}

    def evaluation_capture(self) -> ActivationCapture | None:
        if not self._measures_loss:
            return None
        limits = [self.store.manifest.layer(layer).max_norm for layer in self.layers]
        lm = _load_lm(self.arguments, self.accelerator)  # in the main process alone
        return ActivationCapture(lm, self.layers, limits, self.arguments.model.lm_batch_tokens)

    def held_out_batches(self, batch_size: int) -> Iterable[Mapping[int, Tensor]] | None:
        return held_out_batches(self.store, self.layers, batch_size, contexts=len(self.held_out))

    def _check_model(self) -> None:
        """Refuse another language model than that of the activations before the training, not after it."""
        cached, model = self.store.manifest.model, self.arguments.model
        if "model" in self.arguments.given and model.model != cached.name:
            raise SelOrthoError(
                f'--model {model.model}: the activations of {self.store.source} are those of "{cached.name}"; '
                "leave --model out, or give that one to have the loss recovered measured"
            )
        if self._measures_loss and self.accelerator.is_main_process:
            revision = find_revision(model.model or "", model.model_revision)
            if revision != cached.revision:
                raise SelOrthoError(
                    f'"{model.model}" is at revision {revision}, the activations of {self.store.source} are of '
                    f"{cached.revision}: give that one as --model_revision, or leave --model out"
                )


TrainingData = LiveData | CachedData


def open_store(arguments: TrainingArguments) -> ActivationCache | None:
    """Open the cached activations that the arguments name; their settings take the place of those of the arguments.

    Raises:
        SelOrthoError: the command line contradicts them, or no layer is named and there are several.
    """
    if arguments.data.activations is None:
        return None
    store = ActivationCache(arguments.data.activations)
    for name, (group, *keys) in _CACHED.items():
        value: Any = store.manifest
        for key in keys:
            value = getattr(value, key)
        wanted = getattr(getattr(arguments, group), name)
        if name in arguments.given and wanted != value:
            raise SelOrthoError(
                f"--{name} {wanted}: the activations of {store.source} were cached with {value}; leave it out, or "
                "cache them again"
            )
        setattr(getattr(arguments, group), name, value)
    if not arguments.run.layers and arguments.sae.layer is None:
        if len(layers := store.manifest.layers) > 1:
            raise SelOrthoError(
                f"no layer given: choose --layer, or --layers for several, from {', '.join(map(str, layers))}"
            )
        arguments.sae.layer = layers[0]
    check_layers(store, arguments.run.layers or [arguments.sae.layer])
    return store


def _text_settings(arguments: TrainingArguments) -> dict[str, Any]:
    names = ("dataset_config", "text_column", "min_tokens", "held_out_fraction")
    return {name: getattr(arguments.data, name) for name in names}


def _load_lm(arguments: TrainingArguments, accelerator: Accelerator) -> LanguageModel:
    model = arguments.model
    return load_language_model(model.model or "", model.model_revision, dtype=model.lm_dtype, device=accelerator.device)
