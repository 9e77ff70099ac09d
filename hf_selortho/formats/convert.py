"""Convert an SAE from one format to another, as a folder that is written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import SelOrthoError
from ..training.run_folder import METRICS, RUN, save_sae
from ..utils.files import write_json
from ..utils.hub import CONFIG, find_file, read_object
from ..utils.names import local_path, located
from ..utils.sae_formats import SETS, TARGETS
from .circuit_tracer import SET, is_circuit_tracer, read_circuit_tracer, write_circuit_tracer
from .folders import check_target, whole_folder
from .load import read_sae
from .saelens import FILES, write_saelens

_WRITTEN = FILES | {CONFIG, "model.safetensors", RUN, "sparsity.safetensors"}  # the last one by version 0.1.0


def convert(
    source: str,
    target: Path,
    to: str,
    format: str = "auto",
    overwrite: bool = False,
    approximate: bool = False,
    **lookup: Any,
) -> list[Path]:
    """Read an SAE in one format and write it in another.

    Args:
        source: folder or Hub id of the SAE.
        target: a new or empty folder.
        to: "saelens" or "selortho"; with the latter, run.json says what the SAE was converted from. Of a run with a
            transcoder for each layer: "circuit-tracer"; of such a set of circuit-tracer: "selortho".
        format: that of the source, one of `load.FORMATS`, "circuit-tracer", or "auto".
        overwrite: replace an SAE of an earlier conversion in the target; a folder with anything else stays.
        approximate: read what cannot be read exactly.
        lookup: revision, subfolder, ... as for `load.load_sae`.

    Returns:
        The files that were written; of a set, the folders of its SAEs.

    Raises:
        SelOrthoError: the SAE cannot be read, or the target cannot be written; it is then as it was.
    """
    if to not in TARGETS:
        raise SelOrthoError(f"format {to!r} is not written: expected {' or '.join(TARGETS)}")
    source, lookup = located(source, lookup)
    target, place = Path(local_path(target, "target")), Path(source, lookup.get("subfolder") or "")
    if overwrite and place.is_dir() and target.is_dir() and os.path.samefile(place, target):
        raise SelOrthoError(f"{target} is the SAE to convert: choose another folder")
    if to in SETS or format in SETS or (format == "auto" and not lookup.get("subfolder") and is_circuit_tracer(source)):
        return _convert_set(source, target, to, overwrite)
    replaceable = _WRITTEN if overwrite else None
    check_target(target, replaceable)
    loaded = read_sae(source, format, lookup, approximate)
    with whole_folder(target, replaceable) as folder:
        if to == "saelens":
            write_saelens(loaded.sae, folder, _measured_l0(source, lookup))
        else:
            save_sae(loaded.sae, folder)
            origin: dict[str, Any] = {"format": loaded.format, "name": source, "revision": loaded.revision}
            origin |= {"subfolder": lookup.get("subfolder"), "metadata": dict(loaded.metadata)}
            write_json(folder / RUN, {"converted_from": origin})
        names = sorted(path.name for path in folder.iterdir())
    return [target / name for name in names]


def _convert_set(source: str, target: Path, to: str, overwrite: bool) -> list[Path]:
    """Convert the transcoders of all layers, as [`convert`] does; only a folder of circuit-tracer is replaced."""
    if to not in ("selortho", *SETS) or (to in SETS and is_circuit_tracer(source)):
        raise SelOrthoError(
            f"{source} to {to}: expected a run to circuit-tracer, or a set of circuit-tracer to selortho"
        )
    earlier = {path.name for path in target.glob("layer_*.safetensors")} if target.is_dir() else set()
    with whole_folder(target, {SET, *earlier} if overwrite and to in SETS else None) as folder:
        if to in SETS:
            write_circuit_tracer(source, folder)
        else:
            read_circuit_tracer(source, folder)
        names = sorted(path.name for path in folder.iterdir())
    return [target / name for name in names]


def _measured_l0(source: str, lookup: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measured L0, where the SAE has been evaluated at the end of its training."""
    with suppress(SelOrthoError):  # it does without
        path = find_file(source, METRICS, lookup)
        evaluation = read_object(path).get("evaluation") if path else None
        l0 = evaluation.get("l0") if isinstance(evaluation, dict) else None
        if isinstance(l0, float):
            return {"l0": l0}
    return {}
