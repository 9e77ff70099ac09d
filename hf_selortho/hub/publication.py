"""The folder that is published: assembled and checked as a whole before anything of it leaves the machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import RepoCard

from ..errors import SelOrthoError
from ..features.index_writer import INDEX
from ..formats import write_saelens
from ..modeling_selortho import SelOrthoSAE
from ..training.run_folder import CARD, METRICS, METRICS_LOG, PICTURES, RUN, jsonable, save_sae
from ..utils.command_line import without_secrets
from ..utils.hub import CONFIG, read_object
from .card_facts import SAELENS_FOLDER
from .card_results import Measured
from .model_card import Publisher, render_card
from .remote_code import AUTO_MAP, source_files
from .run_folder import WEIGHTS, FinishedRun
from .summary import SaeReport

_TEXTS = (METRICS, METRICS_LOG, RUN)


@dataclass(frozen=True)
class Publication:
    """A folder as it will be in the repository."""

    folder: Path
    card: RepoCard

    def files(self) -> list[Path]:
        """Paths within the folder, in order."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder) for path in found)

    def size(self, file: Path) -> int:
        """Bytes of one of them."""
        return (self.folder / file).stat().st_size


def publish_run(
    run: FinishedRun,
    folder: Path,
    publisher: Publisher,
    template: str | os.PathLike[str] | None = None,
    include_index: bool = False,
) -> Publication:
    """Assemble what is published of a run: SAEs, exports for SAELens, metrics, pictures, source and one card.

    Args:
        run: the run.
        folder: an empty folder to assemble it in.
        publisher: who publishes it, and where; `saelens` says whether exports are written.
        template: of the card, in place of the package's.
        include_index: take the feature index along.

    Raises:
        SelOrthoError: an SAE cannot be loaded or is not finite, the card cannot be rendered, or there is no room.
    """
    try:
        for sae in run.saes:
            _publish_sae(run, sae, folder / sae.name, publisher.saelens)
            if include_index:
                _publish_index(run.place(sae) / INDEX, folder / sae.name / INDEX)
        if run.saes[0].name:
            _copy_texts(run.folder, folder)
    except OSError as error:
        raise SelOrthoError(f"cannot assemble {run.folder} in {folder}: {error.strerror or error}") from error
    return _finished(folder, run.saes, _without_home(run.run), publisher, template)


def publish_sae(
    sae: SelOrthoSAE, folder: Path, publisher: Publisher, template: str | os.PathLike[str] | None = None
) -> Publication:
    """Assemble what is published of an SAE without its run: the same, without metrics and pictures."""
    _check_finite(sae, "this SAE")
    save_sae(sae, folder)
    _declare_source(folder / CONFIG)
    if publisher.saelens:
        write_saelens(sae, folder / SAELENS_FOLDER)
    report = SaeReport("", sae.config.own_settings(), Measured({}))
    return _finished(folder, [report], {}, publisher, template)


def _publish_sae(run: FinishedRun, report: SaeReport, folder: Path, saelens: bool) -> None:
    place = run.place(report)
    sae = SelOrthoSAE.from_pretrained(place)  # names, shapes and values are looked at
    _check_finite(sae, str(place))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(place / CONFIG, folder / CONFIG)
    _declare_source(folder / CONFIG)
    _link_or_copy(place / WEIGHTS, folder / WEIGHTS)
    _copy_texts(place, folder)
    for picture in report.pictures:
        (folder / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(run.folder / picture, folder / PICTURES / Path(picture).name)
    if saelens:
        write_saelens(sae, folder / SAELENS_FOLDER, metadata=_saelens_metadata(report))


def _saelens_metadata(report: SaeReport) -> dict[str, Any]:
    l0 = (report.metrics.get("evaluation") or {}).get("l0")
    return {} if l0 is None else {"l0": l0}


def _publish_index(index: Path, folder: Path) -> None:
    if not index.is_dir():
        raise SelOrthoError(f"--include_index: there is no {index}; build the feature index first, or leave it out")
    for path in sorted(index.rglob("*")):
        if path.is_file() and not path.is_symlink():
            target = folder / path.relative_to(index)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(path, target)


def _finished(
    folder: Path,
    saes: Sequence[SaeReport],
    run: Mapping[str, Any],
    publisher: Publisher,
    template: str | os.PathLike[str] | None,
) -> Publication:
    for path in source_files():
        shutil.copyfile(path, folder / path.name)
    card = render_card(saes, run, publisher, template)
    (folder / CARD).write_text(str(card), encoding="utf-8")
    for sae in saes:
        SelOrthoSAE.from_pretrained(folder / sae.name)  # as everybody will
    return Publication(folder, card)


def _check_finite(sae: SelOrthoSAE, name: str) -> None:
    for key, tensor in sae.state_dict().items():
        if key != "log_threshold" and not torch.isfinite(tensor).all():
            raise SelOrthoError(f"{key} of {name} holds NaN or infinity: publish an earlier checkpoint, or train again")


def _declare_source(config: Path) -> None:
    """Say in a config.json where the model's source is."""
    content = {**read_object(config), "auto_map": AUTO_MAP}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_texts(place: Path, folder: Path) -> None:
    """Metrics and arguments; secrets and the name of the user's home folder stay here."""
    for name in _TEXTS:
        if not (place / name).is_file():
            continue
        if name == METRICS_LOG:
            shutil.copyfile(place / name, folder / name)
            continue
        content = _without_home(read_object(place / name))
        (folder / name).write_text(json.dumps(jsonable(content), indent=2) + "\n", encoding="utf-8")


def _without_home(value: Any) -> Any:
    if isinstance(value, str):
        home = str(Path.home())
        return without_secrets(value.replace(f"{home}/", "~/") if len(home) > 1 else value)
    if isinstance(value, Mapping):
        return {key: _without_home(item) for key, item in value.items()}
    return [_without_home(item) for item in value] if isinstance(value, list) else value


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file where the disk allows it: weights may be large."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def sizes(publication: Publication) -> Iterator[tuple[str, int]]:
    """Path and bytes of every file."""
    for file in publication.files():
        yield file.as_posix(), publication.size(file)


def size_in_words(publication: Publication) -> str:
    """How many files there are, and how large."""
    rows = list(sizes(publication))
    return f"{len(rows)} files, {sum(size for _, size in rows) / 1e6:.1f} MB"


def size_table(publication: Publication, place: str) -> list[str]:
    """Lines that a dry run begins with: every file with its size, and that nothing was sent to `place`."""
    rows = list(sizes(publication))
    total = f"{sum(size for _, size in rows):>14,}  bytes in {len(rows)} files, for {place}; nothing was sent"
    return [*(f"{size:>14,}  {name}" for name, size in rows), total]
