"""The SAEs of the page, each with its feature index, its model card and what its training has measured."""

from __future__ import annotations

import base64
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_url

from ..configuration_selortho import SelOrthoConfig
from ..data.text_source import SAE_PROBES
from ..errors import SelOrthoError
from ..features.index import FeatureIndex
from ..features.index_writer import INDEX
from ..formats.load import describe_sae
from ..hub.run_folder import shown_name, twin_beside
from ..training.run_folder import CARD, METRICS, METRICS_LOG, read_rows
from ..utils.files import target_outside
from ..utils.hub import CONFIG, at_one_commit, find_file, read_object
from ..utils.names import RepoRef
from ..utils.sae_formats import is_own
from ..utils.site_words import place_in_words
from .address import MAIN, TWIN
from .rendering import label_of

logger = logging.getLogger(__name__)

_LARGEST_CARD = _LARGEST_PICTURE = 1 << 20  # bytes
_CARD_HEADER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_OF_A_RUN = re.compile(r"layer_[^_]+(?:_(.+))?")  # folder of an SAE, with its variant
_PICTURE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>[\w./-]+\.png)\)")


@dataclass(frozen=True)
class CatalogEntry:
    """An SAE of the page; its weights are loaded only where there is a language model."""

    key: str  # "main" or "twin", or the name of another one that a visitor compares with
    title: str
    repo: RepoRef
    config: SelOrthoConfig | None = None  # None: in the format of another library, known with its weights only
    index: FeatureIndex | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    card: str = ""  # the model card, Markdown
    all_layers: dict[str, Any] = field(default_factory=dict)  # of transcoders, with those of all layers in place

    def label(self, feature: int) -> str:
        """Return the label of a feature, "" where there is none; data of others, to be escaped where it is shown.

        Before a label that is not good enough stands "unclear".
        """
        return label_of(self.index, feature)

    @property
    def place(self) -> str:
        """Where in the language model it is: "layer 9, attention heads (attn_z)"; "" where that is not known."""
        return place_in_words(self.config.own_settings()) if self.config else ""

    @property
    def as_other(self) -> str:
        """What the SAE is called where it stands beside the one that is shown."""
        return "its twin" if self.key == TWIN else "with the penalty"

    def read(self, trained_on: bool) -> str:
        """Say whether the training has read texts of the corpus sae-probes; if it read another one, whether they are.

        Args:
            trained_on: whether the corpus sae-probes holds the texts.
        """
        words = "trained on" if self.config and self.config.dataset == SAE_PROBES else "in the corpus sae-probes"
        return words if trained_on else f"not {words}"


def open_catalog(sae: str, twin: str | None) -> dict[str, CatalogEntry]:
    """Open the SAE and its twin (twin baseline: the same run without the penalty), where there is one.

    Args:
        sae: folder of an SAE or of a run, or owner/name[@revision][/subfolder].
        twin: the same of its twin; None: looked for beside it.

    Raises:
        SelOrthoError: there is no such SAE, or its index is damaged.
    """
    repo = _sae_of_run(RepoRef.parse(sae))
    other = RepoRef.parse(twin) if twin else _find_twin(repo)
    catalog = {MAIN: open_entry(MAIN, repo)}
    if other is not None:
        catalog[TWIN] = open_entry(TWIN, other)
    return catalog


def open_entry(key: str, repo: RepoRef) -> CatalogEntry:
    """Read what is known of an SAE, without its weights; all of it from the same commit."""
    if not repo.is_local:
        repo = RepoRef(repo.name, at_one_commit(repo.name, repo.lookup).get("revision"), repo.subfolder)

    def find(file: str) -> Path | None:
        return find_file(repo.name, file, repo.lookup)

    metrics, rows = find(METRICS), find(METRICS_LOG)
    card = find(CARD) or find_file(repo.name, CARD, RepoRef(repo.name, repo.revision).lookup)
    if not (has_index := find(f"{INDEX}/index.json") is not None):
        logger.warning("%s has no feature index: the page shows live text only", repo)
    return CatalogEntry(
        key=key,
        title=_title(repo),
        repo=repo,
        config=_config(repo, find(CONFIG), has_index),
        index=FeatureIndex.open(repo.name, **repo.lookup) if has_index else None,
        metrics=read_object(metrics) if metrics else {},
        rows=read_rows(rows) if rows else [],
        card=card.read_text("utf-8", "replace") if card and card.stat().st_size <= _LARGEST_CARD else "",
        all_layers=_all_layers(repo),
    )


def _config(repo: RepoRef, own: Path | None, has_index: bool) -> SelOrthoConfig | None:
    """Read the config of an SAE in any format, without its weights; None where there is an index and no SAE."""
    if own and is_own(read_object(own), SelOrthoConfig.model_type):
        return SelOrthoConfig.from_pretrained(repo.name, **repo.lookup)
    try:
        _, place, description = describe_sae(repo.name, "auto", repo.lookup, approximate=True, headers_only=True)
    except SelOrthoError:
        if own or not has_index:
            raise
        return None
    return description.config(str(place)) if description else None


def _all_layers(repo: RepoRef) -> dict[str, Any]:
    """Read from the metrics.json beside the folder of an SAE what was measured of all SAEs of its variant together."""
    path = Path(repo.name if repo.is_local else "", repo.subfolder or "")
    variant = _OF_A_RUN.fullmatch(path.name)
    if variant is None:
        return {}
    above = path.parent.as_posix()
    run = RepoRef(above) if repo.is_local else RepoRef(repo.name, repo.revision, None if above == "." else above)
    file = find_file(run.name, METRICS, run.lookup)
    measured = read_object(file).get("all_layers") if file else None
    figures = measured.get(variant[1] or "") if isinstance(measured, dict) else None
    return figures if isinstance(figures, dict) else {}


def _title(repo: RepoRef) -> str:
    """A short name, without the folders of this machine."""
    if repo.is_local:
        return shown_name(Path(repo.name, repo.subfolder or ""))
    return f"{repo.name}/{repo.subfolder}" if repo.subfolder else repo.name


def _sae_of_run(repo: RepoRef) -> RepoRef:
    """The SAE itself, where a run of several was given: the first one that was trained with the penalty."""
    if not repo.is_local or Path(repo.name, CONFIG).is_file():
        return repo
    saes = sorted(path for path in Path(repo.name).glob("layer_*") if (path / CONFIG).is_file())
    penalised = [path for path in saes if not path.name.endswith("_twin")] or saes
    if not penalised:
        return repo
    if len(penalised) > 1:
        logger.warning("%s holds %d SAEs: showing %s", repo, len(saes), penalised[0].name)
    return RepoRef(str(penalised[0]))


def _find_twin(repo: RepoRef) -> RepoRef | None:
    """layer_8_twin beside layer_8, or runs/demo-twin beside runs/demo."""
    if repo.is_local:
        beside = twin_beside(Path(repo.name).resolve())
        return None if beside is None else RepoRef(str(beside))
    if not repo.subfolder:
        return None
    twin = RepoRef(repo.name, repo.revision, f"{repo.subfolder}_twin")
    return twin if find_file(twin.name, CONFIG, twin.lookup) else None


def card_markdown(entry: CatalogEntry) -> str:
    """Return the model card without its metadata, its pictures within; data of others, to be sanitised when shown."""
    body = _CARD_HEADER.sub("", entry.card)
    return _PICTURE.sub(lambda match: _picture(entry.repo, match["alt"], match["path"]), body)


def _picture(repo: RepoRef, alt: str, path: str) -> str:
    if not repo.is_local:
        return f"![{alt}]({hf_hub_url(repo.name, path, revision=repo.revision)})"
    folder = Path(repo.name)
    file = folder / path
    if not file.is_file() or target_outside(folder, file) or file.stat().st_size > _LARGEST_PICTURE:
        return f"*{alt}*"
    return f"![{alt}](data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()})"
