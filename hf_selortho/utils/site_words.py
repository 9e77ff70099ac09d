"""Say in words where in a language model an SAE reads and, of a transcoder, what it reconstructs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Of each site what it is, and how it lies to its decoder layer.
_PLACES = {
    "resid_pre": ("residual stream", "before"),
    "resid_mid": ("residual stream between attention and MLP", "of"),
    "resid_post": ("residual stream", "after"),
    "attn_z": ("attention heads", "of"),
    "attn_out": ("attention output", "of"),
    "mlp_in": ("MLP input", "of"),
    "mlp_out": ("MLP output", "of"),
}


def site_in_words(site: str, layers: Sequence[int]) -> str:
    """Say what a site is: "MLP output of decoder layer 9"; of a module, "output of PATH"; "" without a layer."""
    if site not in _PLACES:
        module, _, side = site.rpartition(":")
        return f"{side} of {module}"
    if not layers:
        return ""
    *first, last = map(str, layers)
    numbers = f"the decoder layers {', '.join(first)} and {last}" if first else f"decoder layer {last}"
    return f"{_PLACES[site][0]} {_PLACES[site][1]} {numbers}"


def place_in_words(config: Mapping[str, Any]) -> str:
    """Say in short where an SAE is: "layer 9", "layer 9, attention heads (attn_z)", "MLP of layer 9: mlp_in → mlp_out".

    Args:
        config: its settings, of which `layer`, `site` and `target` count; "" where the layer is not known.
    """
    layer, site, target = config.get("layer"), config.get("site") or "resid_post", config.get("target")
    if site not in _PLACES:
        return f"{site} → {target}" if target else site
    if layer is None:
        return ""
    if target:
        return f"{'MLP of ' * (site == 'mlp_in' and target == 'mlp_out')}layer {layer}: {site} → {target}"
    what, lies = _PLACES[site]
    where = {"resid_post": "", "resid_pre": f", {what} {lies} it (resid_pre)"}
    return f"layer {layer}{where.get(site, f', {what} ({site})')}"
