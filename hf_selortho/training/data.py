"""Where a run's activations come from: a language model reading texts while it trains, or shards harvested before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.activation_cache import ActivationCache
from ..data.buffer import ActivationBuffer, ActivationStatistics, BatchSource
from ..data.cache_batches import CachedBatches, check_layers, held_out_batches
from ..data.cache_manifest import Manifest
from ..data.contexts import Context, ContextStream, held_out_contexts
from ..data.texts import Documents, open_documents
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..language_models.loading import LanguageModel, check_context_length, find_revision, load_language_model
from .arguments import TrainingArguments
from .non_finite import NonFiniteGuard

# Settings that a harvest has decided, by the group of arguments that holds them: where the manifest has them.
_HARVESTED: dict[str, dict[str, tuple[str, ...]]] = {
    "sae": {
        "context_length": ("contexts", "context_length"),
        "prepend_bos": ("contexts", "prepend_bos"),
        "max_norm_ratio": ("max_norm_ratio",),
    },
    "data": {
        "min_tokens": ("contexts", "min_tokens"),
        "dataset": ("text", "dataset"),
        "dataset_config": ("text", "config"),
        "dataset_revision": ("text", "revision"),
        "split": ("text", "split"),
        "text_column": ("text", "text_column"),
        "held_out_fraction": ("text", "held_out_fraction"),
    },
}


class TrainingData(ABC):
    """Batches to train on, and held-out activations to evaluate on."""

    source: BatchSource
    source_device: torch.device  # that holds the activations of the source
    held_out: list[Context]  # in the main process; empty if nothing is evaluated
    measures_loss: bool  # whether the evaluation runs the language model on the held-out contexts

    @abstractmethod
    def statistics(self, progress: bool) -> dict[int, ActivationStatistics]:
        """Mean, scale and sink threshold of each layer; called once, before the first batch of a new run."""

    @abstractmethod
    def provenance(self, layer: int) -> dict[str, Any]:
        """Fields of the SAE's configuration that say where its activations come from."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What, besides the fields of `provenance`, has to be the same for the same activations."""

    @abstractmethod
    def watch(self, guard: NonFiniteGuard) -> None:
        """Let the guard decide about activations that are not finite."""

    @abstractmethod
    def source_bytes(self, arguments: TrainingArguments) -> int:
        """Memory of the activations that a run with these arguments holds."""

    @abstractmethod
    def evaluation_capture(self) -> ActivationCapture | None:
        """The language model at the layers of the run; None if it is not to be had."""

    @abstractmethod
    def held_out_batches(self, batch_size: int) -> Iterable[Mapping[int, Tensor]] | None:
        """Held-out activations; None: `evaluation_capture` has to compute them."""


class LiveData(TrainingData):
    """A frozen language model reads the texts while the SAEs train."""

    def __init__(self, arguments: TrainingArguments, layers: Sequence[int], accelerator: Accelerator) -> None:
        self.arguments, self.accelerator = arguments, accelerator
        self.documents: Documents = open_documents(arguments.data.source())
        self.lm = load_lm(arguments, accelerator)
        check_context_length(self.lm, arguments.sae.context_length)
        self.capture = ActivationCapture(self.lm, layers, batch_tokens=arguments.model.lm_batch_tokens)
        self.source_device = self.capture.device
        self.measures_loss = arguments.evaluation.eval_ce_samples > 0
        self.held_out = self._find_held_out() if accelerator.is_main_process else []
        self.source: ActivationBuffer = self._make_buffer(arguments)

    def statistics(self, progress: bool) -> dict[int, ActivationStatistics]:
        return self.source.fill(progress)

    def provenance(self, layer: int) -> dict[str, Any]:
        data = self.arguments.data
        return {
            "d_in": self.lm.d_model,
            "lm_name": self.lm.name,
            "lm_revision": self.lm.revision,
            "hook_name": self.capture.hook_name_of(layer),
            "dataset": self.documents.name,
            "dataset_revision": self.documents.revision,
            "dataset_split": self.documents.split,
            "dataset_config": data.dataset_config,
            "text_column": data.text_column,
            "min_tokens": data.min_tokens,
            "held_out_fraction": data.held_out_fraction,
        }

    def identity(self) -> dict[str, Any]:
        dtype = str(self.lm.model.dtype).removeprefix("torch.")
        return {"texts": self.documents.fingerprint, "lm_dtype": dtype}

    def watch(self, guard: NonFiniteGuard) -> None:
        self.capture.on_non_finite = guard.meet_activations

    def source_bytes(self, arguments: TrainingArguments) -> int:
        return self._make_buffer(arguments).memory_bytes()  # which takes nothing until it is filled

    def evaluation_capture(self) -> ActivationCapture | None:
        return self.capture

    def held_out_batches(self, batch_size: int) -> Iterable[Mapping[int, Tensor]] | None:
        return None

    def _find_held_out(self) -> list[Context]:
        """Contexts of documents that training never sees; found before the training to fail early."""
        samples, data, sae = self.arguments.evaluation.eval_samples, self.arguments.data, self.arguments.sae
        if samples == 0 or data.held_out_fraction == 0:
            return []
        return held_out_contexts(
            self.documents,
            self.lm.tokenizer,
            limit=samples,
            context_length=sae.context_length,
            prepend_bos=sae.prepend_bos,
            min_tokens=data.min_tokens,
        )

    def _make_buffer(self, arguments: TrainingArguments) -> ActivationBuffer:
        """This process's part of the buffer, over documents that no other process reads."""
        data, run, sae = arguments.data, arguments.run, arguments.sae
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        stream = ContextStream(
            self.documents,
            self.lm.tokenizer,
            context_length=sae.context_length,
            prepend_bos=sae.prepend_bos,
            seed=run.seed,
            rank=rank,
            world_size=processes,
            min_tokens=data.min_tokens,
        )
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


class ShardData(TrainingData):
    """Shards hold the activations; neither the language model nor the texts are needed.

    Given by name (`--model`), the language model is loaded at the end, to measure the loss recovered.
    """

    def __init__(
        self, store: ActivationCache, arguments: TrainingArguments, layers: Sequence[int], accelerator: Accelerator
    ) -> None:
        self.store, self.arguments, self.layers, self.accelerator = store, arguments, list(layers), accelerator
        self.source_device = torch.device("cpu")
        self._capture: ActivationCapture | None = None
        samples = arguments.evaluation.eval_samples
        self.held_out = store.held_out_contexts()[:samples] if accelerator.is_main_process and samples else []
        self.measures_loss = bool("model" in arguments.given and arguments.evaluation.eval_ce_samples and samples)
        self._check_model()
        self.source: CachedBatches = self._make_batches(arguments)

    def statistics(self, progress: bool) -> dict[int, ActivationStatistics]:
        return self.source.statistics()

    def provenance(self, layer: int) -> dict[str, Any]:
        manifest, summary = self.store.manifest, self.store.manifest.layer(layer)
        model, text = manifest.model, manifest.text
        return {
            "d_in": summary.d_in,
            "lm_name": model.name,
            "lm_revision": model.revision,
            "hook_name": summary.hook_name,
            "dataset": text.dataset,
            "dataset_revision": text.revision,
            "dataset_split": text.split,
            "dataset_config": text.config,
            "text_column": text.text_column,
            "min_tokens": manifest.contexts.min_tokens,
            "held_out_fraction": text.held_out_fraction,
        }

    def evaluation_capture(self) -> ActivationCapture | None:
        if not self.measures_loss:
            return None
        if self._capture is None:
            model, device = self.arguments.model, self.accelerator.device
            # by the main process alone, so nobody waits for the others here
            lm = load_language_model(model.model or "", model.model_revision, dtype=model.lm_dtype, device=device)
            limits = [self.store.manifest.layer(layer).max_norm for layer in self.layers]
            self._capture = ActivationCapture(lm, self.layers, limits, model.lm_batch_tokens)
        return self._capture

    def held_out_batches(self, batch_size: int) -> Iterable[Mapping[int, Tensor]] | None:
        return held_out_batches(self.store, self.layers, batch_size, contexts=len(self.held_out))

    def identity(self) -> dict[str, Any]:
        return {"activations": self.store.sha256}

    def watch(self, guard: NonFiniteGuard) -> None:
        """Nothing is computed here: what the shards hold meets the guard in the training step."""

    def source_bytes(self, arguments: TrainingArguments) -> int:
        return self._make_batches(arguments).memory_bytes()

    def _make_batches(self, arguments: TrainingArguments) -> CachedBatches:
        """This process's batches; the pool holds about as much as the buffer over a language model would."""
        processes, tokens = (
            self.accelerator.num_processes,
            arguments.data.buffer_contexts * arguments.sae.context_length,
        )
        return CachedBatches(
            self.store,
            self.layers,
            batch_size=arguments.run.batch_size // processes,
            pool_tokens=-(-tokens // processes),
            seed=arguments.run.seed,
            rank=self.accelerator.process_index,
            processes=processes,
        )

    def _check_model(self) -> None:
        """Refuse another language model than the harvested one before the training, not after it."""
        harvested, model = self.store.manifest.model, self.arguments.model
        if "model" in self.arguments.given and model.model != harvested.name:
            raise SelOrthoError(
                f'--model {model.model}: the activations of {self.store.source} are those of "{harvested.name}"; '
                "leave --model out, or give that one to have the loss recovered measured"
            )
        if not self.measures_loss or not self.accelerator.is_main_process:
            return
        found = find_revision(model.model or "", model.model_revision)
        if found != harvested.revision:
            raise SelOrthoError(
                f'"{model.model}" is at revision {found}, the activations of {self.store.source} are of '
                f"{harvested.revision}: give that one as --model_revision, or leave --model out"
            )


def open_store(arguments: TrainingArguments) -> ActivationCache | None:
    """The harvested activations that the arguments name; their settings take the place of those of the arguments.

    Raises:
        SelOrthoError: the command line contradicts them, or no layer is named and there are several.
    """
    if arguments.data.activations is None:
        return None
    store = ActivationCache(arguments.data.activations)
    for group, names in _HARVESTED.items():
        for name, path in names.items():
            value: Any = store.manifest
            for key in path:
                value = getattr(value, key)
            wanted = getattr(getattr(arguments, group), name)
            if name in arguments.given and wanted != value:
                raise SelOrthoError(
                    f"--{name} {wanted}: the activations of {store.source} were harvested with {value}; leave it out, "
                    "or harvest again"
                )
            setattr(getattr(arguments, group), name, value)
    _choose_layers(arguments, store.manifest)
    check_layers(store, arguments.run.layers or [arguments.sae.layer])
    return store


def _choose_layers(arguments: TrainingArguments, manifest: Manifest) -> None:
    if arguments.run.layers or arguments.sae.layer is not None:
        return
    if len(manifest.layers) > 1:
        raise SelOrthoError(
            f"no layer given: choose --layer, or --layers for several, from {', '.join(map(str, manifest.layers))}"
        )
    arguments.sae.layer = manifest.layers[0]


def load_lm(arguments: TrainingArguments, accelerator: Accelerator) -> LanguageModel:
    """The frozen language model on this process's device; one process a machine downloads or converts it first."""
    model = arguments.model
    assert model.model is not None
    with accelerator.local_main_process_first():
        return load_language_model(model.model, model.model_revision, dtype=model.lm_dtype, device=accelerator.device)
