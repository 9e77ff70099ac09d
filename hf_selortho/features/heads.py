"""Which attention heads the features of an SAE write to, where it reconstructs the heads' outputs side by side."""

from __future__ import annotations

from torch import Tensor

from ..errors import SelOrthoError
from ..language_models.loading import LanguageModel
from ..modeling_selortho import SelOrthoSAE
from .token_features import language_model_of

HEADS_SITE = "attn_z"


def head_norms(sae: SelOrthoSAE, lm: LanguageModel | str | None = None, token: str | None = None) -> Tensor:
    """Norm of each feature's decoder direction within each attention head: (d_sae, heads), in float32.

    Args:
        sae: one that reconstructs `attn_z`, the outputs of the heads before the output projection.
        lm, token: as of [`FeatureCapture`].

    Raises:
        SelOrthoError: it reconstructs another site, or the language model has heads of another width.
    """
    config = SelOrthoSAE.checked(sae).config
    if config.written_site != HEADS_SITE:
        raise SelOrthoError(
            f"this SAE reconstructs {config.written_site}: its directions belong to heads only at {HEADS_SITE}"
        )
    lm = language_model_of(sae, lm, token)
    text_config = lm.model.config.get_text_config()
    heads, width = text_config.num_attention_heads, sae.W_dec.shape[1]
    of_head = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    if width != heads * of_head:
        raise SelOrthoError(
            f'"{lm.name}" has {heads} attention heads of width {of_head}, the SAE d_out={width}: take the language '
            f"model of its training{f', {config.lm_name}' if config.lm_name else ''}"
        )
    return sae.W_dec.detach().float().unflatten(1, (heads, -1)).norm(dim=2)
