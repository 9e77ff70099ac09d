"""The SAEs that a Space shows: repositories of the Hub, each at the commit that was there at the deployment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi

from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..features.index_writer import INDEX
from ..utils.hub import LOOKUP_ERRORS, RepoRef, hub_error, patiently
from .card_facts import EMBEDDED_MODEL, base_model
from .run_folder import WEIGHTS


@dataclass(frozen=True)
class PinnedSae:
    """An SAE on the Hub, at a commit."""

    place: RepoRef
    config: SelOrthoConfig
    has_index: bool
    restricted: bool  # private or gated: nobody reads it without a token

    @property
    def language_model(self) -> str | None:
        """Its id on the Hub; None for one of a local folder."""
        return base_model(self.config.own_settings())


class SpaceSaes(NamedTuple):
    """What the page shows."""

    sae: PinnedSae
    twin: PinnedSae | None = None

    def all(self) -> list[PinnedSae]:
        """Both, if there are two."""
        return [sae for sae in self if sae is not None]


def pin_sae(name: str, token: str | None = None) -> PinnedSae:
    """The SAE that `owner/name[@revision][/subfolder]` means on the Hub now, at the commit that holds it.

    Raises:
        SelOrthoError: there is no such repository, revision or SAE, or no access to it.
    """
    if os.path.isdir(name):
        raise SelOrthoError(
            f"{name} is a folder of this machine, which a Space cannot read: publish it with scripts/push_to_hub.py, "
            "then name its repository"
        )
    place = RepoRef.parse(name, local=False)
    try:
        info = patiently(lambda: HfApi(token=token).model_info(place.name, revision=place.revision))
    except LOOKUP_ERRORS as error:
        raise hub_error(error, "SAE", place.name, place.revision) from error
    pinned = RepoRef(place.name, info.sha, place.subfolder)
    config = SelOrthoConfig.from_pretrained(place.name, token=token, **pinned.lookup)
    folder = PurePosixPath(place.subfolder or "")
    files = {file.rfilename for file in info.siblings or []}
    if not files & {str(folder / WEIGHTS), str(folder / f"{WEIGHTS}.index.json")}:
        raise SelOrthoError(f"{name} has an SAE's config without its weights ({folder / WEIGHTS}): publish it again")
    return PinnedSae(pinned, config, str(folder / INDEX / "index.json") in files, bool(info.private or info.gated))


def advice(saes: SpaceSaes, token: str | None = None) -> Iterator[str]:
    """What the owner of the Space should know or do, a sentence each."""
    for sae in saes.all():
        if not sae.has_index:
            yield (
                f"{sae.place} has no {INDEX}/, so the page will have live text only, and nothing about a feature or a "
                "pair: build it with scripts/build_feature_index.py, publish it with push_to_hub.py --include_index, "
                "and deploy again"
            )
    hub_models = {sae.language_model for sae in saes.all() if sae.config.lm_name != EMBEDDED_MODEL} - {None}
    closed = [sae.place.name for sae in saes.all() if sae.restricted]
    closed += [name for name in sorted(map(str, hub_models)) if _is_restricted(name, token)]
    if closed:
        yield (
            f"private or gated: {', '.join(closed)}; give the Space a token that may read this, as the secret HF_TOKEN "
            "in its settings"
        )
    unknown = {sae.config.lm_name for sae in saes.all() if sae.config.lm_name and sae.language_model is None}
    if unknown:
        yield (
            f"the language model {', '.join(sorted(map(str, unknown)))} was not loaded from the Hub when the SAE was "
            "trained: if it is not there either, live text and steering will be missing"
        )


def _is_restricted(name: str, token: str | None) -> bool:
    try:
        info = patiently(lambda: HfApi(token=token).model_info(name))
    except LOOKUP_ERRORS:  # advice is no reason to fail
        return False
    return bool(info.private or info.gated)
