"""Activations of the last token of texts, by which a causal language model represents each whole, kept on the disk."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..data.cache_manifest import tokenizer_hash
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture, NonFiniteActivationsError, length_batches
from ..language_models.contexts import Context, pad_batch
from ..language_models.loading import check_context_length
from ..language_models.sites import find_site
from ..utils.files import reason, replace_file
from ..utils.progress import Bar

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return where activations of last tokens are kept, for every SAE of the same language model, layer and site."""
    return Path(constants.HF_HOME) / "hf_selortho" / "probes"


def read_last_tokens(
    capture: ActivationCapture,
    sets: Mapping[str, Sequence[str]],
    tokens: int,
    *,
    prepend_bos: bool,
    cache: Path | None,
    progress: bool = True,
) -> Iterator[tuple[str, dict[int, Tensor]]]:
    """Yield the name of each set of texts with their last tokens by layer, (texts, d_in) in float32 on the CPU.

    A text that is in several sets is read once, and a set whose activations are in the cache not at all; a file there
    is whole or absent, and one that is damaged is made again.

    Args:
        capture: a language model at one or several layers; its limits on norms play no role.
        sets: texts by name of the set, each once in a set.
        tokens: of a longer text, so many are read, BOS included: its end.
        prepend_bos: whether texts start with the tokenizer's BOS.
        cache: folder in which the activations are kept, a file for each set and layer; None: nowhere.
        progress: whether to show a bar.

    Raises:
        SelOrthoError: the tokenizer has no BOS, or the language model reads fewer tokens, or it produced NaN or
            infinity.
    """
    check_context_length(capture.lm, tokens)
    occurrences = Counter(text for texts in sets.values() for text in texts)
    lm = capture.lm
    of_lm = [lm.name, lm.revision, str(lm.model.dtype), tokenizer_hash(lm.tokenizer), capture.device.type]
    shared: dict[str, dict[int, Tensor]] = {}  # activations of texts that several sets have
    with Bar("probing", total=sum(map(len, sets.values())), unit="text", disable=not progress) as bar:
        for name, texts in sets.items():
            identity = [*of_lm, tokens, prepend_bos, texts]
            files = {layer: _file_of(cache, name, [_place(capture, layer), *identity]) for layer in capture.layers}
            by_layer = {layer: rows for layer, file in files.items() if (rows := _load(file, len(texts))) is not None}
            if missing := [layer for layer in files if layer not in by_layer]:
                unknown = [n for n, text in enumerate(texts) if text not in shared]
                fresh = _read(capture, [texts[n] for n in unknown], tokens, prepend_bos, bar)
                for layer in missing:
                    rows = by_layer[layer] = torch.empty(len(texts), capture.widths[layer])
                    rows[unknown] = fresh[layer]
                    for n, text in enumerate(texts):
                        if text in shared:
                            rows[n] = shared[text][layer]
                    _store(files[layer], rows)
                bar.update(len(texts) - len(unknown))
            else:
                bar.update(len(texts))
            for n, text in enumerate(texts):
                if occurrences[text] > 1 and text not in shared:
                    shared[text] = {layer: rows[n].clone() for layer, rows in by_layer.items()}
            yield name, by_layer


def _read(
    capture: ActivationCapture, texts: Sequence[str], tokens: int, prepend_bos: bool, bar: Bar
) -> dict[int, Tensor]:
    """Run the language model over the ends of texts, those of similar length at once, padded on the right."""
    lm, result = capture.lm, {layer: torch.empty(len(texts), capture.widths[layer]) for layer in capture.layers}
    if prepend_bos and lm.tokenizer.bos_token_id is None:
        raise SelOrthoError(
            f'the tokenizer of "{lm.name}" has no beginning-of-sequence token, with which the SAE was trained: give '
            "the language model of the training as --model"
        )
    if not texts:
        return result
    prefix = [lm.tokenizer.bos_token_id] if prepend_bos else []
    width = tokens - len(prefix)
    encoded = lm.tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    contexts = [
        Context(n, prefix + ids[-width:] or [lm.pad_id])  # an empty text without BOS
        for n, ids in enumerate(encoded["input_ids"])
    ]
    for numbers in length_batches(contexts, capture.batch_tokens):
        batch = [contexts[n] for n in numbers]
        last = torch.tensor([len(context.input_ids) - 1 for context in batch])
        for layer, hidden in capture.hidden_states(*pad_batch(batch, lm.pad_id)).items():
            rows = hidden[torch.arange(len(batch)), last].float().cpu()
            if not rows.isfinite().all():
                raise SelOrthoError(
                    f"NaN or infinity in the activations of {lm.name} at layer {layer}; "
                    f"{NonFiniteActivationsError.advice}"
                )
            result[layer][numbers] = rows
        bar.update(len(batch))
    return result


def _place(capture: ActivationCapture, layer: int) -> Any:
    """Name what is read; the output of a decoder layer by its number, under which it has always been kept."""
    site = capture.sites[layer]
    return layer if site == find_site(capture.lm, layer, "resid_post") else (site.module, site.side)


def _file_of(cache: Path | None, name: str, identity: Sequence[Any]) -> Path | None:
    """Name the file of a set in the cache by everything that its activations depend on."""
    if cache is None:
        return None
    digest = hashlib.sha256(repr(identity).encode("utf-8", "surrogatepass")).hexdigest()
    return cache / f"{name}-{digest[:24]}.safetensors"


def _load(file: Path | None, texts: int) -> Tensor | None:
    """Read the activations of a file of the cache; None where there is none, or one that is damaged."""
    if file is None or not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            activations, sha256 = opened.get_tensor("activations"), (opened.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s): it is made again", file, error)
        return None
    if len(activations) != texts or _sha256(activations) != sha256:
        logger.warning("%s is damaged: it is made again", file)
        return None
    return activations


def _store(file: Path | None, activations: Tensor) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, save({"activations": activations}, metadata={"sha256": _sha256(activations)}))
    except OSError as error:  # what was read is not lost for that
        logger.warning("%s cannot be kept: %s", file, reason(error))


def _sha256(activations: Tensor) -> str:
    return hashlib.sha256(activations.numpy().tobytes()).hexdigest()
