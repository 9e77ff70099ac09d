"""Whether the activations that an SAE reads are those that are read of a language model here."""

from __future__ import annotations

from torch import nn

from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..language_models.loading import LanguageModel


def check_site(config: SelOrthoConfig) -> None:
    """See that an SAE reads the residual stream after a decoder layer, or does not say what it reads.

    Raises:
        SelOrthoError: it names another site, such as the output of an MLP.
    """
    if config.layer is None and config.hook_name is not None:
        raise SelOrthoError(
            f"this SAE reads {config.hook_name}, not the output of a decoder layer, which is all that is read here "
            "(whatever --layer says): choose an SAE of the residual stream, or encode activations of yours with it"
        )


def check_centering(config: SelOrthoConfig, lm: LanguageModel) -> None:
    """See that a language model does without the mean over d_model that the activations of a `centered` SAE lack.

    Raises:
        SelOrthoError: its norms are no LayerNorms, so that the mean counts.
    """
    if config.centered and not any(isinstance(module, nn.LayerNorm) for module in lm.layers.modules()):
        raise SelOrthoError(
            f'this SAE reads activations less their mean (centered=true in its config), and "{lm.name}" has no '
            "LayerNorm, which would take the mean away: give the language model of its training (--model), or, as "
            "TransformerLens centres none without, set centered (center_writing_weights in a cfg.json) to false"
        )
