"""Tell what a file, folder or repository of an SAE is, without its weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configuration_selortho import SelOrthoConfig
from ..utils.hub import CONFIG
from .load import READERS, describe_sae
from .place import Place

_INDEX = "feature_index"  # the folder of a feature index, beside the SAE
_L0 = re.compile(r"_l0_(\d+)(?:/|$)", re.IGNORECASE)  # in names of folders


def sae_info(name: str, lookup: Mapping[str, Any]) -> dict[str, Any]:
    """Tell what is known of an SAE, and what is not; of a run of several, the folders of its SAEs.

    Args:
        name: a folder, a file of weights or a repository. lookup: as for `load.load`.

    Raises:
        SelOrthoError: there is none, or it is of a kind that is not read.
    """
    saes = sorted(path.parent.name for path in Path(name).glob(f"*/{CONFIG}")) if os.path.isdir(name) else []
    if len(saes) > 1 and not Path(name, CONFIG).exists() and not lookup.get("subfolder"):
        return {"name": name, "format": "a run of several SAEs", "saes": saes}
    format, place, description = describe_sae(name, "auto", lookup, approximate=True, headers_only=True)
    found: dict[str, Any] = {"name": str(place), "format": READERS[format].title if description else "hf_selortho"}
    found["revision"] = None if os.path.isdir(place.name) else place.lookup.get("revision")
    if description is None:
        config = SelOrthoConfig.from_pretrained(place.name, **place.lookup)
        found |= _of_settings(config.own_settings(), config.width_out, str(config.dtype or "").removeprefix("torch."))
        found["feature_index"] = _INDEX in place.names
    else:
        shapes = description.shapes(place.name)
        d_in, d_sae = shapes["W_enc"]
        more: dict[str, Any] = {"skip": "W_skip" in shapes}
        more |= {"activation": description.activation, "k": description.k, "d_in": d_in, "d_sae": d_sae}
        dtype = description.tensors.headers[description.names["W_enc"].removesuffix(".T")][1]
        found |= _of_settings({**description.facts, **more}, shapes["W_dec"][1], dtype)
        found |= {"l0": _stated_l0(description.metadata, place, description.k)}
        found |= {"folded": list(description.folded), "not_exact": description.lost}
    unknown = [key for key in ("lm_name", "lm_revision", "layer", "l0", "context_length") if found.get(key) is None]
    kept = {key: value for key, value in found.items() if value not in (None, [], "", False)}
    return kept | {"unknown": unknown}


def _of_settings(settings: Mapping[str, Any], d_out: int, dtype: str) -> dict[str, Any]:
    keys = "lm_name lm_revision layer site hook_name hook_side target target_hook_name target_hook_side d_in".split()
    found: dict[str, Any] = {"kind": "transcoder" if settings.get("target") else "SAE"}
    found |= {key: settings.get(key) for key in keys}
    found |= {"d_out": d_out if settings.get("target") else None, "d_sae": settings["d_sae"]}
    found |= {key: settings.get(key) for key in ("activation", "k", "skip", "centered", "context_length", "dataset")}
    return found | {"dtype": dtype}


def _stated_l0(metadata: Mapping[str, Any], place: Place, k: int | None) -> Any:
    named, stated = _L0.search(f"{place}"), metadata.get("l0")
    if isinstance(stated, (int, float)):
        return stated
    return int(named[1]) if named else k
