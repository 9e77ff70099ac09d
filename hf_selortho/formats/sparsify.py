"""The format of sparsify: cfg.json and sae.safetensors, a folder for each hook; SAEs and transcoders."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from ..errors import SelOrthoError
from ..utils.hub import find_file, read_object
from .description import LENS, Description
from .keys import KeyTable, unless, warn_of_unknown
from .names import facts_of_hooks
from .place import Place
from .plain import checked_k

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_KEYS = KeyTable(
    obeyed={
        **dict.fromkeys(("d_in", "k", "num_latents", "expansion_factor"), object),
        **dict.fromkeys(("transcode", "skip_connection", "signed"), bool),  # the last one before version 1
    },
    meaningless="normalize_decoder multi_topk",  # they act in training only
    refused={"activation": unless("topk", reason="expected 'topk', k features of all")},
)
_MODULE = re.compile(r"(?:layers|h)\.\d{1,4}(?:\..+)?|embed_tokens|embed_in|wte")
_NAMES = LENS | {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias"}


def find(place: Place) -> str | None:
    """Return the file of weights, if this is the format."""
    return place.has(WEIGHTS)


def describe(place: Place, file: str) -> Description:
    """Tell what an SAE or transcoder with the activation function topk is; b_dec is subtracted from an SAE's input.

    Raises:
        SelOrthoError: it is of another kind, or its files are damaged.
    """
    path = place.path(CONFIG, f"{CONFIG} and {WEIGHTS}")
    content = read_object(path)
    warn_of_unknown(_KEYS.check(content, str(path)), str(path))
    d_in, k, factor = content.get("d_in"), content.get("k"), content.get("expansion_factor", 32)
    d_sae = content.get("num_latents") or (d_in * factor if type(d_in) is type(factor) is int else None)
    transcodes, skips = bool(content.get("transcode")), bool(content.get("skip_connection"))
    return Description(
        place.tensors(file),
        _NAMES | ({"W_skip": "W_skip.T"} if skips else {}),
        "abstopk" if content.get("signed") else "topk",
        k=checked_k(k, str(path)),
        subtracts=not transcodes,
        widths=(d_in, d_sae),
        facts=_facts(place, transcodes),
        metadata=content,
    )


def _facts(place: Place, transcodes: bool) -> dict[str, Any]:
    """Tell what is read by the name of the folder, which is that of the module, or of one with a seed in it."""
    names = [PurePosixPath(str(place)).name, PurePosixPath(str(place)).parent.name]
    hook = names[1] if re.fullmatch(r"seed\d+", names[0]) else names[0]
    facts: dict[str, Any] = {}
    if place.folder and (top := find_file(place.name, "config.json", {**place.lookup, "subfolder": None})):
        model = read_object(top).get("model")  # of the whole training
        facts["lm_name"] = model if isinstance(model, str) else None
    if not _MODULE.fullmatch(hook):
        if transcodes:
            raise SelOrthoError(f"{place} is a transcoder: expected the folder named like the module, as layers.3.mlp")
        return facts
    return facts | facts_of_hooks(module=f"{hook}.input" if transcodes else hook, module_out=f"{hook}.output")
