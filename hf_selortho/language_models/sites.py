"""Hook sites: the places in a language model where activations are read or replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import SelOrthoError
from .loading import LanguageModel


@dataclass(frozen=True)
class HookSite:
    """The input or the output of one module of a language model."""

    module: str  # its path in the model, such as "model.layers.8"
    side: Literal["input", "output"] = "output"

    def hook(self, model: nn.Module, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call `function` on the activations at this site in every forward pass of `model`.

        What it returns takes their place; None leaves them as they are. Of several inputs or outputs, the first counts.
        """

        def apply(value: Any) -> Any:
            if not isinstance(value, (tuple, list)):
                return function(value)
            changed = function(value[0])
            return None if changed is None else type(value)([changed, *value[1:]])

        module = model.get_submodule(self.module)
        if self.side == "input":
            return module.register_forward_pre_hook(lambda _module, inputs: apply(inputs))
        return module.register_forward_hook(lambda _module, _inputs, output: apply(output))


def decoder_layer_output(lm: LanguageModel, layer: int) -> HookSite:
    """Name the site of the residual stream after a decoder layer of `lm`, counted from 0.

    Raises:
        SelOrthoError: the layer is out of range.
    """
    depth = len(lm.layers)
    if not 0 <= layer < depth:
        raise SelOrthoError(f'layer {layer} is out of range: "{lm.name}" has {depth} layers, choose 0 to {depth - 1}')
    return HookSite(f"{lm.layers_path}.{layer}")
