"""One pass of an SAE over held-out text: batches of feature activations, laid out feature by feature."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..configuration_selortho import SelOrthoConfig
from ..data.contexts import Context, pad_batch
from ..language_models.capture import ActivationCapture, CapturedActivations
from ..modeling_selortho import SelOrthoSAE
from ..utils.files import sha256_of
from .keepers import Batch

WEIGHTS = "model.safetensors"
_POOL_BATCHES = 16  # forward passes whose contexts are sorted by length together
_LARGEST_BATCH = {"cpu": 1 << 24, "cuda": 1 << 28}  # feature activations held at once


@dataclass
class TextCounts:
    """What has been read of a text."""

    documents: int = 0
    contexts: int = 0
    tokens: int = 0  # that the SAE reads: no BOS, no other special token, no sink
    dropped_special: int = 0
    dropped_sinks: int = 0


@dataclass(frozen=True)
class Read:
    """A batch, and the raw activations that it comes from."""

    batch: Batch
    activations: Tensor  # (tokens, d_in), of the tokens that `batch.read` marks, in their order


class TextPass:
    """Reads contexts with a language model and encodes them with an SAE.

    `counts` says what has been read so far.

    Args:
        sae: the SAE. capture: the language model at its layer.
    """

    def __init__(self, sae: SelOrthoSAE, capture: ActivationCapture) -> None:
        self.sae, self.capture = sae, capture
        self.counts = TextCounts()
        self._last_document: int | None = None

    @torch.inference_mode()
    def read(self, contexts: Iterable[Context], progress: tqdm | None = None) -> Iterator[Read]:
        """Batches of some contexts, which are taken a pool at a time."""
        stream = iter(contexts)
        while pool := list(self._pool(stream)):
            first = self.counts.contexts
            self._count(pool)
            for captured in self.capture.capture_batches(pool):
                self.counts.tokens += len(captured)
                self.counts.dropped_special += captured.dropped_special
                self.counts.dropped_sinks += captured.dropped_sinks
                for part in self._parts(captured):
                    yield self._encoded(part, pool, first)
                if progress is not None:
                    progress.update(len(captured))

    def _pool(self, stream: Iterator[Context]) -> Iterator[Context]:
        tokens = 0
        while tokens < _POOL_BATCHES * self.capture.batch_tokens and (fresh := list(itertools.islice(stream, 1))):
            tokens += len(fresh[0].input_ids)
            yield fresh[0]

    def _count(self, pool: list[Context]) -> None:
        self.counts.contexts += len(pool)
        for context in pool:  # those of a document come one after another
            self.counts.documents += context.document_id != self._last_document
            self._last_document = context.document_id

    def _parts(self, captured: CapturedActivations) -> Iterator[CapturedActivations]:
        """Whole contexts of a forward pass, as many as memory holds at once."""
        limit = _LARGEST_BATCH.get(self.sae.device.type, 1 << 24)
        tokens = max(1, limit // self.sae.b_enc.shape[0])
        if len(captured) <= tokens:
            if len(captured):
                yield captured
            return
        rows, counts = captured.origins.context_ids.unique_consecutive(return_inverse=True, return_counts=True)[1:]
        group = (counts.cumsum(0) - counts) // tokens  # of each context, by its first token
        for number in group.unique().tolist():
            yield captured[group[rows] == number]

    def _encoded(self, captured: CapturedActivations, pool: list[Context], first: int) -> Read:
        origins, device = captured.origins, self.sae.device
        numbers, rows = origins.context_ids.unique_consecutive(return_inverse=True)
        contexts = [pool[number] for number in numbers.tolist()]
        input_ids, _ = pad_batch(contexts, self.capture.lm.tokenizer.pad_token_id or 0)
        places = (rows * input_ids.shape[1] + origins.positions).to(device)
        activations = captured.by_layer[self.capture.layer].to(device)
        h = feature_rows(self.sae.encode(activations), places, input_ids.shape)
        read = torch.zeros(input_ids.shape, dtype=torch.bool, device=device)
        read.view(-1)[places] = True
        batch = Batch(
            h=h,
            read=read,
            input_ids=input_ids.to(device),
            lengths=torch.tensor([len(context.input_ids) for context in contexts], device=device),
            documents=torch.tensor([context.document_id for context in contexts], device=device),
            numbers=numbers.to(device) + first,
        )
        return Read(batch, activations)


def feature_rows(feature_acts: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Activations (tokens, n) as (n, b, t), contiguous, with 0 where there is no token.

    Args:
        feature_acts: (tokens, n). places: (tokens,) of each among the `b * t`. shape: (b, t).
    """
    feature_acts = feature_acts.float()
    if len(places) < shape.numel():
        whole = feature_acts.new_zeros(shape.numel(), feature_acts.shape[1])
        feature_acts = whole.index_copy_(0, places, feature_acts)
    return feature_acts.T.contiguous().unflatten(1, shape)


def taken(contexts: Iterable[Context], tokens: int, beside_bos: bool) -> Iterator[Context]:
    """Contexts from the start until they hold so many tokens, not counting a BOS at the front of each."""
    held = 0
    for context in contexts:
        if held >= tokens:
            return
        held += len(context.input_ids) - beside_bos
        yield context


def some_features(sae: SelOrthoSAE, features: Tensor) -> SelOrthoSAE:
    """An SAE of some of the features, which encodes each as the whole one does.

    With topk and batchtopk, what fires depends on the others: it is the whole SAE then.

    Args:
        sae: the whole one. features: (m,), rising.
    """
    if not encodes_apart(sae.config):
        return sae
    settings = {**sae.config.own_settings(), "d_sae": len(features), "matryoshka_prefixes": None}
    part: Any = SelOrthoSAE(SelOrthoConfig(**settings))
    part = part.to(sae.device).eval()
    columns = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "log_threshold": 0}
    state = {
        name: tensor.index_select(columns[name], features.to(tensor.device)) if name in columns else tensor
        for name, tensor in sae.state_dict().items()
    }
    part.load_state_dict(state)
    part.store_by_feature()
    return part


def encodes_apart(config: SelOrthoConfig) -> bool:
    """Whether a feature's activation does not depend on the other features."""
    return config.activation in ("relu", "jumprelu")


def weights_sha256(sae: SelOrthoSAE, folder: Path | None = None) -> str:
    """A sha256 that names the weights of an SAE.

    That of the bytes of its model.safetensors, as the Hub shows it, where the SAE comes from a folder that holds it;
    else of name, dtype, shape and bytes of every tensor, by name.
    """
    if folder is not None and (folder / WEIGHTS).is_file():
        return sha256_of(folder / WEIGHTS)
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
