"""Small SAEs and texts to build indexes of, and the same numbers computed the long way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.data.contexts import Cutter, held_out_contexts
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.features.build import Sources
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.language_models.contexts import Context, pad_batch
from hf_selortho.modeling_selortho import ENCODER_NORMS

CONTEXT_LENGTH = 24


def make_sae(lm, seed: int = 0, d_sae: int = 48, **settings) -> SelOrthoSAE:
    """A random SAE that fires on some of the tokens, one of whose features never does, and two of which are one."""
    torch.manual_seed(seed)
    named = {"lm_name": lm.name, "lm_revision": lm.revision, "layer": 2, "context_length": CONTEXT_LENGTH}
    config = SelOrthoConfig(d_in=32, d_sae=d_sae, pair_fraction=0.05, **{**named, **settings})
    sae = SelOrthoSAE(config).eval()
    with torch.no_grad():
        sae.set_input_statistics(torch.zeros(32), 20.0)
        sae.b_enc.uniform_(-0.6, 0.1).mul_(ENCODER_NORMS[config.activation])
        sae.b_enc[5] = -1e6
        sae.W_dec[9].copy_(sae.W_dec[8])
        sae.W_enc[:, 9].copy_(sae.W_enc[:, 8])
        sae.b_enc[9] = sae.b_enc[8]
    return sae


def make_sources(lm, path, sae: SelOrthoSAE | None = None, fraction: float = 0.5, **parts) -> Sources:
    sae = sae or make_sae(lm)
    assert sae.config.layer is not None
    return Sources(
        sae=sae,
        capture=ActivationCapture(lm, sae.config.layer, sae.config.max_norm, batch_tokens=128),
        documents=open_documents(TextSource(str(path), held_out_fraction=fraction)),
        name="small",
        weights_sha256="0" * 64,
        **parts,
    )


@dataclass(frozen=True)
class Everything:
    """All activations of a text at once."""

    contexts: list[Context]
    h: list[Tensor]  # (t, d_sae) of each context; 0 where the SAE was not trained
    x: list[Tensor]  # (t, d_in)
    read: list[Tensor]  # (t,) bool

    @property
    def tokens(self) -> Tensor:
        """(tokens, d_sae), of those that the SAE reads."""
        return torch.cat([h[read] for h, read in zip(self.h, self.read, strict=True)])


@torch.inference_mode()
def read_everything(sources: Sources, tokens: int | None = None) -> Everything:
    """The text, or its contexts up to so many tokens, a context at a time."""
    config, lm = sources.sae.config, sources.capture.lm
    cutter = Cutter(lm.tokenizer, context_length=config.context_length)
    contexts = list(held_out_contexts(sources.documents, cutter))
    if tokens is not None:
        held = 0
        for count, context in enumerate(contexts):
            if held >= tokens:
                contexts = contexts[:count]
                break
            held += len(context.input_ids) - 1
    parts = []
    for context in contexts:
        input_ids, mask = pad_batch([context], 0)
        hidden = sources.capture.hidden_states(input_ids, mask)[sources.capture.layer]
        read = sources.capture.keep_mask(input_ids, mask, hidden)[0]
        parts.append((sources.sae.encode(hidden)[0] * read[:, None], hidden[0], read))
    return Everything(contexts, *(list(part) for part in zip(*parts, strict=True)))
