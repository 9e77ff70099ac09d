"""Assemble and check the folder that is published, as a whole, before anything of it leaves the machine."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import RepoCard

from .. import modeling_selortho
from ..data.activation_cache import ActivationCache
from ..data.cache_folder import manifest_bytes
from ..data.cache_manifest import MANIFEST
from ..errors import SelOrthoError
from ..features.index_writer import FACTS, FILES, INDEX
from ..features.top_contexts import WINDOW
from ..formats import write_saelens
from ..modeling_selortho import SelOrthoSAE
from ..training.arguments import PublicIds
from ..training.run_folder import CARD, METRICS, METRICS_LOG, MOVED, PICTURES, RUN
from ..utils.files import jsonable, refuse_outside
from ..utils.hub import CONFIG, read_object
from ..utils.library_errors import storage_error
from .card_results import SaeReport
from .dataset_card import render_shards_card
from .gate import refuse_private
from .model_card import SAELENS_FOLDER, SaeCard, terms_of
from .public_names import PublicNames
from .run_folder import WEIGHTS, FinishedRun

logger = logging.getLogger(__name__)

# The source with which `trust_remote_code=True` works where this package is not installed: the file of the model and
# those that it imports from its folder. transformers looks for them at the top, also for the SAE of a sub-folder.
SOURCE = ("activation_functions.py", "configuration_selortho.py", "modeling_selortho.py")
AUTO_MAP = {"AutoConfig": "configuration_selortho.SelOrthoConfig", "AutoModel": "modeling_selortho.SelOrthoSAE"}


@dataclass(frozen=True)
class Publication:
    """A folder as it will be in the repository."""

    folder: Path
    card: RepoCard

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file by its path, in order."""
        return {name: path.stat().st_size for name, path in files_of(self.folder).items()}

    def __str__(self) -> str:
        return f"{len(self.sizes)} files, {sum(self.sizes.values()) / 1e6:.1f} MB"

    def listing(self, place: str) -> str:
        """List every file with its size for a dry run, which sends nothing to `place`; raises as [`refuse_private`]."""
        refuse_private(files_of(self.folder))
        lines = [f"{size:>14,}  {name}" for name, size in self.sizes.items()]
        total = f"{sum(self.sizes.values()):>14,}  bytes in {len(lines)} files, for {place}; nothing was sent"
        return "\n".join([*lines, total, ""])


def files_of(folder: Path) -> dict[str, Path]:
    """Return every file of a folder by its path within, in order."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def publish_run(
    run: FinishedRun,
    folder: Path,
    repo_id: str,
    *,
    saelens: bool = True,
    include_index: bool = False,
    license: str | None = None,
    license_link: str | None = None,
    template: str | os.PathLike[str] | None = None,
    ids: PublicIds | None = None,
    token: str | None = None,
) -> Publication:
    """Assemble what is published of a run: SAEs, exports for SAELens, metrics, pictures, source and one card.

    Args:
        run: the run.
        folder: an empty folder to assemble it in.
        repo_id: where it will be published.
        saelens: add exports for SAELens.
        include_index: take the feature index along.
        license, license_link, template: of the card, see [`SaeCard`].
        ids: what a local language model and text are on the Hub.
        token: access token to look them up with; without it, the stored one or HF_TOKEN.

    Raises:
        SelOrthoError: an SAE cannot be loaded or is not finite, the card cannot be rendered, there is no room, or an id
            is not on the Hub.
    """
    if saelens and any(sae.config.get("target") and sae.config.get("activation") == "topk" for sae in run.saes):
        logger.warning("no export for SAELens: it has no transcoders with activation topk")
        saelens = False
    lm = run.saes[0].config.get("lm_name")
    names = PublicNames.of(run.saes[0].config, ids or PublicIds(), token)
    run = replace(run, saes=tuple(_public(sae, names) for sae in run.saes), run=names.clean(run.run))
    terms = terms_of(lm) or terms_of(names.settings.get("lm_name"))
    facts: dict[str, Any] = {"terms": terms, "all_layers": run.all_layers}
    card = SaeCard(run.saes, run.run, repo_id, saelens, license, license_link, template, **facts).render()
    with _assembling(run.folder, folder):
        for sae in run.saes:
            _copy_sae(run, sae, folder / sae.name, saelens, names)
            if include_index:
                _copy_index(run.folder / sae.name / INDEX, folder / sae.name / INDEX, names)
        if run.saes[0].name:
            _copy_texts(run.folder, folder, names)
        for name in SOURCE:
            shutil.copyfile(Path(modeling_selortho.__file__).with_name(name), folder / name)
        (folder / CARD).write_text(str(card), encoding="utf-8")
    return Publication(folder, card)


def publish_cache(
    cache: Path,
    folder: Path,
    repo_id: str,
    *,
    license: str | None = None,
    ids: PublicIds | None = None,
    token: str | None = None,
) -> Publication:
    """Assemble what is published of cached activations: the shards, the manifest and the card of a dataset.

    Args:
        cache: folder of the activations.
        folder, repo_id, license, ids, token: as of [`publish_run`].

    Raises:
        SelOrthoError: the cache is damaged or incomplete, there is no room, or an id is not on the Hub.
    """
    manifest = ActivationCache(str(cache)).manifest
    names = PublicNames.of(vars(manifest), ids or PublicIds(), token)
    public = replace(manifest, **names.settings)
    card = render_shards_card(public, repo_id, license, terms_of(manifest.lm_name) or terms_of(public.lm_name))
    with _assembling(cache, folder):
        for path in (Path(path) for entry in (*manifest.shards, *manifest.held_out) for path in entry.files):
            refuse_outside(cache, cache / path)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(cache / path, folder / path)
        (folder / MANIFEST).write_bytes(manifest_bytes(public))
        (folder / CARD).write_text(str(card), encoding="utf-8")
    return Publication(folder, card)


@contextmanager
def _assembling(source: Path, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = f"cannot assemble {source} in {folder}: {error.strerror or error}"
        raise storage_error(error) or SelOrthoError(said) from error


def _copy_sae(run: FinishedRun, report: SaeReport, folder: Path, saelens: bool, names: PublicNames) -> None:
    place = run.folder / report.name
    folder.mkdir(parents=True, exist_ok=True)
    config = {**names.of_settings(read_object(place / CONFIG)), "auto_map": AUTO_MAP}
    _write(folder / CONFIG, config, sort_keys=True)
    _link_or_copy(place / WEIGHTS, folder / WEIGHTS)
    sae = SelOrthoSAE.from_pretrained(folder)  # as everybody will: names, shapes and values are looked at
    for key, tensor in sae.state_dict().items():
        if key != "log_threshold" and not torch.isfinite(tensor).all():
            raise SelOrthoError(
                f"{key} of {report.name or 'the SAE'} holds NaN or infinity: publish an earlier checkpoint, or train "
                "again"
            )
    _copy_texts(place, folder, names)
    for picture in report.pictures:
        (folder / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(run.folder / picture, folder / PICTURES / Path(picture).name)
    if saelens:
        l0 = report.figure("l0") if report.metrics.get("evaluation") else None
        write_saelens(sae, folder / SAELENS_FOLDER, metadata={} if l0 is None else {"l0": l0})


def _copy_index(index: Path, folder: Path, names: PublicNames) -> None:
    if not index.is_dir():
        raise SelOrthoError(f"--include_index: there is no {index}; build the feature index first, or leave it out")
    folder.mkdir()
    for path in (index / name for name in FILES):
        refuse_outside(index.parent, path)
        if not path.is_file():
            continue
        if path.name == FACTS:
            facts = names.clean(read_object(path))
            _write(folder / FACTS, facts, ensure_ascii=False)
            logger.info(
                "the feature index shows pieces of the text %s, of at most %d tokens each: publish it where the terms "
                "of that text allow it",
                facts.get("text", {}).get("dataset", "that it was built from"),
                WINDOW,
            )
        else:
            _link_or_copy(path, folder / path.name)


def _copy_texts(place: Path, folder: Path, names: PublicNames) -> None:
    """Copy metrics and arguments; secrets and names of this machine stay here."""
    for name in (METRICS, RUN, METRICS_LOG, MOVED):
        refuse_outside(place, place / name)
    for name in (METRICS, RUN):
        if (place / name).is_file():
            _write(folder / name, jsonable(names.clean(read_object(place / name))))
    for name in (METRICS_LOG, MOVED):
        if (place / name).is_file():
            shutil.copyfile(place / name, folder / name)


def _public(sae: SaeReport, names: PublicNames) -> SaeReport:
    """Return a report that names nothing of this machine."""
    beside = {key: names.clean(getattr(sae, key)) for key in ("metrics", "twin", "seeds", "twin_seeds")}
    return replace(sae, config=names.of_settings(sae.config), **beside)


def _write(path: Path, content: Mapping[str, Any], **options: Any) -> None:
    path.write_text(json.dumps(content, indent=2, **options) + "\n", encoding="utf-8")


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name where the disk allows it: weights may be large."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
