"""Say what the local language model and text of a run are called where they are published."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..data.text_source import EMBEDDED_TEXTS
from ..errors import SelOrthoError
from ..language_models.embedded import EMBEDDED_MODEL
from ..training.arguments import PublicIds
from ..utils.hub import is_commit, resolve_commit
from ..utils.names import Kind, RepoRef
from ..utils.privacy import LOCAL_MODEL, LOCAL_TEXT, is_path, without_paths

logger = logging.getLogger(__name__)

_SNAPSHOT = re.compile(r"[/\\](?:models|datasets)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?$")
_UNPUBLISHED = {
    LOCAL_MODEL: "the language model is one of this machine: others can encode activations of their own, but neither "
    "capture texts nor evaluate, index or browse; publish the model and say where with --model_id (model_id=)",
    LOCAL_TEXT: "the text is one of this machine: others can neither train again nor evaluate on it; if it is on the "
    "Hub, say where with --dataset_id (dataset_id=)",
}


@dataclass(frozen=True)
class PublicNames:
    """What names of this machine become in a repository: see [`PublicNames.of`]."""

    settings: Mapping[str, Any]  # of an SAE or a cache: "lm_name", "lm_revision", "dataset", "dataset_revision"
    known: Mapping[str, str]  # public by local name
    revisions: Mapping[str, str | None]  # by local name, of what is on the Hub all the same

    @classmethod
    def of(cls, config: Mapping[str, Any], ids: PublicIds, token: str | None = None) -> PublicNames:
        """Find the public names for the settings of an SAE or of a cache.

        What lies in the Hub's cache has the name that it has on the Hub. A warning says what others cannot do with a
        model or text that has none.

        Raises:
            SelOrthoError: an id is not on the Hub, or is given for what came from there.
        """
        settings, known, revisions = dict[str, Any](), dict[str, str](), dict[str, str | None]()
        kinds: tuple[tuple[Kind, str, str, str], ...] = (
            ("model", "lm_name", "lm_revision", "model_id"),
            ("dataset", "dataset", "dataset_revision", "dataset_id"),
        )
        for kind, key, revision_key, option in kinds:
            local, revision = config.get(key), config.get(revision_key)
            public, public_revision = _on_the_hub(kind, local, revision, getattr(ids, option), token)
            if public is None:
                continue
            settings |= {key: public, revision_key: public_revision}
            known |= {local or public: public, public: public}
            if public != local and public not in _UNPUBLISHED:
                revisions[local or public] = public_revision
        return cls(settings, known, revisions)

    def clean(self, value: Any) -> Any:
        """Return settings, figures or facts with public names in place of those of this machine."""
        return without_paths(value, self.known, self.revisions)

    def of_settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of an SAE as they are published."""
        return self.clean({**config, **self.settings})


def check_ids(ids: PublicIds) -> None:
    """Raise a SelOrthoError if an id is not on the Hub."""
    given_ids: tuple[tuple[Kind, str | None], ...] = (("model", ids.model_id), ("dataset", ids.dataset_id))
    for kind, given in given_ids:
        if given:
            find_commit(kind, given)


def find_commit(kind: Kind, given: str, token: str | None = None) -> tuple[str, str | None]:
    """Split owner/name[@revision] into the id and the commit that it is at; None where the Hub cannot be reached.

    Raises:
        SelOrthoError: the Hub answers that there is no such repository or revision, or gives no access to it.
    """
    ref = RepoRef.parse(given, local=False, kind=kind)
    return ref.name, ref.revision if is_commit(ref.revision) else resolve_commit(kind, ref.name, ref.revision, token)


def _on_the_hub(
    kind: Kind, name: str | None, revision: str | None, given: str | None, token: str | None
) -> tuple[str | None, str | None]:
    """Return name and revision under which a language model or text is published."""
    if name and (match := _SNAPSHOT.search(name)):
        name, revision = match[1].replace("--", "/"), match[2]
    is_local = name not in (None, EMBEDDED_MODEL, *EMBEDDED_TEXTS) and not is_commit(revision)
    is_local = is_local and (str(revision).startswith("local-") or is_path(str(name)))
    if given:
        if name not in (None, given.partition("@")[0]) and not is_local:
            raise SelOrthoError(
                f"--{kind}_id {given}: the run has read {name}, which is no {kind} of this machine: leave it out"
            )
        return find_commit(kind, given, token)
    if not is_local:
        return name, revision
    placeholder = LOCAL_MODEL if kind == "model" else LOCAL_TEXT
    logger.warning("%s", _UNPUBLISHED[placeholder])
    return placeholder, revision
