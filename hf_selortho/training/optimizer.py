"""Adam over the weights of an SAE, in the memory order in which its sparse gradients come out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modeling_selortho import SelOrthoSAE
from .arguments import RunArguments

FROZEN: dict[str, tuple[str, ...]] = {  # weights of each part that --freeze names
    "none": (), "encoder": ("W_enc", "b_enc", "log_threshold"), "decoder": ("W_dec", "b_dec", "W_skip")
}  # fmt: skip


class SAEOptimizer:
    """Fused Adam on the parameters of an SAE that are not frozen, which alone have a gradient.

    The encoder is stored feature by feature and handed to Adam as `W_enc.T` (d_sae, d_in), the same memory seen
    contiguously: on the transposed parameter, fused Adam would copy everything twice, which takes longer than the step.
    """

    def __init__(self, sae: SelOrthoSAE, arguments: RunArguments, device: torch.device) -> None:
        sae.store_by_feature()
        self.sae = sae
        for name, parameter in sae.named_parameters():
            parameter.requires_grad_(name not in FROZEN[arguments.freeze])
        self.encoder = nn.Parameter(sae.W_enc.data.T)  # (d_sae, d_in)
        self.names = [name for name, parameter in sae.named_parameters() if parameter.requires_grad]
        self.adam = torch.optim.Adam(
            [self.encoder if name == "W_enc" else sae.get_parameter(name) for name in self.names],
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            fused=device.type in ("cpu", "cuda"),
        )

    def take_gradients(self) -> None:
        """Let Adam see the encoder's gradient, which autograd has left at `W_enc`."""
        gradient = self.sae.W_enc.grad
        self.encoder.grad = None if gradient is None else gradient.T

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.adam.zero_grad()
        self.sae.zero_grad()

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Adam's state by parameter, in the parameters' shapes: views, so that what is written to them counts."""
        states = [self.adam.state[parameter] for parameter in self.adam.param_groups[0]["params"]]
        return {name: _as_parameter(name, state) for name, state in zip(self.names, states, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """The state as `<parameter>.<exp_avg|exp_avg_sq|step>`, for a checkpoint: views, which change with it."""
        return {f"{name}.{key}": value for name, state in self.moments().items() for key, value in state.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of [`tensors`]."""
        if not tensors:  # it had taken no step, as when all batches were skipped
            return
        for name, parameter in zip(self.names, self.adam.param_groups[0]["params"], strict=True):
            saved = _as_parameter(name, {key: tensors[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step")})
            self.adam.state[parameter] = {key: v.to(parameter.device).contiguous() for key, v in saved.items()}


def _as_parameter(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The moments of the encoder the other way round: from Adam's shape to the parameter's, or back."""
    return {key: value.T if name == "W_enc" and value.ndim == 2 else value for key, value in state.items()}
