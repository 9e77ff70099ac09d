"""Assemble and check the folder that is published, as a whole, before anything of it leaves the machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import RepoCard

from .. import modeling_selortho
from ..errors import SelOrthoError
from ..features.index_writer import INDEX
from ..formats import write_saelens
from ..modeling_selortho import SelOrthoSAE
from ..training.run_folder import CARD, METRICS, METRICS_LOG, PICTURES, RUN
from ..utils.command_line import without_secrets
from ..utils.files import jsonable
from ..utils.hub import CONFIG, read_object
from ..utils.library_errors import storage_error
from .card_results import SaeReport
from .model_card import SAELENS_FOLDER, SaeCard
from .run_folder import WEIGHTS, FinishedRun

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
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}

    def __str__(self) -> str:
        return f"{len(self.sizes)} files, {sum(self.sizes.values()) / 1e6:.1f} MB"

    def listing(self, place: str) -> str:
        """List every file with its size for a dry run, which sends nothing to `place`."""
        lines = [f"{size:>14,}  {name}" for name, size in self.sizes.items()]
        total = f"{sum(self.sizes.values()):>14,}  bytes in {len(lines)} files, for {place}; nothing was sent"
        return "\n".join([*lines, total, ""])


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
) -> Publication:
    """Assemble what is published of a run: SAEs, exports for SAELens, metrics, pictures, source and one card.

    Args:
        run: the run.
        folder: an empty folder to assemble it in.
        repo_id: where it will be published.
        saelens: add exports for SAELens.
        include_index: take the feature index along.
        license, license_link, template: of the card, see [`SaeCard`].

    Raises:
        SelOrthoError: an SAE cannot be loaded or is not finite, the card cannot be rendered, or there is no room.
    """
    facts = _without_private(run.run)
    card = SaeCard(run.saes, facts, repo_id, saelens, license, license_link, template).render()
    try:
        for sae in run.saes:
            _copy_sae(run, sae, folder / sae.name, saelens)
            if include_index:
                _copy_index(run.folder / sae.name / INDEX, folder / sae.name / INDEX)
        if run.saes[0].name:
            _copy_texts(run.folder, folder)
        for name in SOURCE:
            shutil.copyfile(Path(modeling_selortho.__file__).with_name(name), folder / name)
        (folder / CARD).write_text(str(card), encoding="utf-8")
    except OSError as error:
        said = f"cannot assemble {run.folder} in {folder}: {error.strerror or error}"
        raise storage_error(error) or SelOrthoError(said) from error
    return Publication(folder, card)


def _copy_sae(run: FinishedRun, report: SaeReport, folder: Path, saelens: bool) -> None:
    place = run.folder / report.name
    folder.mkdir(parents=True, exist_ok=True)
    config = {**read_object(place / CONFIG), "auto_map": AUTO_MAP}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _link_or_copy(place / WEIGHTS, folder / WEIGHTS)
    sae = SelOrthoSAE.from_pretrained(folder)  # as everybody will: names, shapes and values are looked at
    for key, tensor in sae.state_dict().items():
        if key != "log_threshold" and not torch.isfinite(tensor).all():
            raise SelOrthoError(
                f"{key} of {report.name or 'the SAE'} holds NaN or infinity: publish an earlier checkpoint, or train "
                "again"
            )
    _copy_texts(place, folder)
    for picture in report.pictures:
        (folder / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(run.folder / picture, folder / PICTURES / Path(picture).name)
    if saelens:
        l0 = report.figure("l0") if report.metrics.get("evaluation") else None
        write_saelens(sae, folder / SAELENS_FOLDER, metadata={} if l0 is None else {"l0": l0})


def _copy_index(index: Path, folder: Path) -> None:
    if not index.is_dir():
        raise SelOrthoError(f"--include_index: there is no {index}; build the feature index first, or leave it out")
    for path in index.rglob("*"):
        if path.is_file() and not path.is_symlink():
            target = folder / path.relative_to(index)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(path, target)


def _copy_texts(place: Path, folder: Path) -> None:
    """Copy metrics and arguments; secrets and the name of the user's home folder stay here."""
    for name in (METRICS, RUN):
        if (place / name).is_file():
            content = jsonable(_without_private(read_object(place / name)))
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if (place / METRICS_LOG).is_file():
        shutil.copyfile(place / METRICS_LOG, folder / METRICS_LOG)


def _without_private(value: Any) -> Any:
    if isinstance(value, str):
        home = str(Path.home())
        return without_secrets(value.replace(f"{home}/", "~/") if len(home) > 1 else value)
    if isinstance(value, Mapping):
        return {key: _without_private(item) for key, item in value.items()}
    return [_without_private(item) for item in value] if isinstance(value, list) else value


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name where the disk allows it: weights may be large."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
