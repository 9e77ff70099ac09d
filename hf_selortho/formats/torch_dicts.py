"""SAEs that are a .pt of tensors alone: attention SAEs with a _cfg.json, of Goodfire, of qresearch, of OpenAI."""

from __future__ import annotations

import re
from typing import Any

from ..errors import SelOrthoError
from .description import LENS, LINEAR, Description
from .names import facts_of_hooks, hub_name
from .place import Place

_FILE = r"(?!.*\.sae\.pt$|ae\.pt$|(?:trainer_state|sae_weights)\.pt$).+\.(?:pt|pth)"
_GOODFIRE = {name: their.replace(".", "_linear.", 1) for name, their in LINEAR.items()}
_OPENAI = {"W_enc": "encoder.weight.T", "b_enc": "latent_bias", "W_dec": "decoder.weight.T", "b_dec": "pre_bias"}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_LOCATIONS = {"resid_post_mlp": "hook_resid_post", "resid_post_attn": "hook_resid_mid", "mlp_post_act": "mlp.hook_post"}
_LOCATIONS |= {"resid_delta_attn": "hook_attn_out", "resid_delta_mlp": "hook_mlp_out"}
_PLACE = re.compile(r"(?:.*(?:/|--))?([\w.-]+)-SAE-l(\d{1,3})(?:/.*)?")
_OWNERS = {"Llama": "meta-llama", "DeepSeek": "deepseek-ai"}


def find_hook_z(place: Place) -> str | None:
    """Return the file of weights, if a config of its own name is beside it."""
    names = "|".join(re.escape(name.removesuffix("_cfg.json")) for name in place.names if name.endswith("_cfg.json"))
    return place.one(rf"(?:{names})\.pt") if names else None


def find_goodfire(place: Place) -> str | None:
    """Return the file of weights, if its tensors are named as those of Goodfire."""
    return _find(place, _GOODFIRE)


def find_qresearch(place: Place) -> str | None:
    """Return the file of weights, if its tensors are named as those of qresearch."""
    return _find(place, LINEAR)


def find_openai(place: Place) -> str | None:
    """Return the file of weights, if its tensors are named as those of OpenAI's sparse_autoencoder."""
    return _find(place, _OPENAI)


def _find(place: Place, names: dict[str, str]) -> str | None:
    file = place.one(_FILE)
    if file is None or not {their.removesuffix(".T") for their in names.values()} <= place.tensors(file).headers.keys():
        return None
    return file


def describe_hook_z(place: Place, file: str) -> Description:
    """Tell what an SAE of the concatenated heads of an attention layer is."""
    config = place.json(file.removesuffix(".pt") + "_cfg.json")
    facts = {"lm_name": hub_name(config.get("model_name"))} | facts_of_hooks(config.get("act_name"))
    widths = (config.get("act_size"), config.get("dict_size"))
    return Description(place.tensors(file), LENS, subtracts=True, widths=widths, facts=facts, metadata=config)


def describe_goodfire(place: Place, file: str) -> Description:
    """Tell what a ReLU SAE of Goodfire is."""
    return Description(place.tensors(file), _GOODFIRE, facts=_facts(place))


def describe_qresearch(place: Place, file: str) -> Description:
    """Tell what a ReLU SAE of qresearch is."""
    return Description(place.tensors(file), LINEAR, facts=_facts(place))


def describe_openai(place: Place, file: str) -> Description:
    """Tell what a ReLU SAE of OpenAI is.

    Raises:
        SelOrthoError: it is of version 5, which normalises each token by its own mean and norm.
    """
    tensors = place.tensors(file)
    activation = tensors.loaded.get("activation", "ReLU")
    if activation != "ReLU":
        raise SelOrthoError(
            f"{tensors.path}: activation={activation!r:.50} of OpenAI's sparse_autoencoder is not read: each token is "
            "normalised by its own mean and norm, which no weights can say; choose one of version 4"
        )
    location = next((hook for part, hook in _LOCATIONS.items() if part in str(place)), None)
    number = re.fullmatch(r"(\d{1,3})\.pt", file)
    facts: dict[str, Any] = {"lm_name": "openai-community/gpt2" if "gpt2-small" in str(place) else None}
    facts |= facts_of_hooks(f"blocks.{int(number[1])}.{location}") if number and location else {}
    return Description(tensors, _OPENAI, subtracts=True, ignored=_STATISTICS, facts=facts)


def _facts(place: Place) -> dict[str, Any]:
    """Tell language model and layer by the name of the repository, MODEL-SAE-lN."""
    named = _PLACE.fullmatch(str(place))
    if named is None:
        return {}
    owner = next((owner for part, owner in _OWNERS.items() if named[1].startswith(part)), None)
    model, layer = f"{owner}/{named[1]}" if owner else None, int(named[2])
    return {"lm_name": model, "site": "resid_post", "layer": layer, "hook_name": f"model.layers.{layer}"}
