"""Convert SAEs between formats.

python -m hf_selortho.hub.interop convert runs/demo demo-saelens --to saelens
python -m hf_selortho.hub.interop convert google/gemma-scope-2b-pt-res scope --to selortho \
    --subfolder layer_20/width_16k/average_l0_71
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ...command_line import run_script
from ...errors import SelOrthoError
from ...training.outputs import RUN, save_sae, write_json
from . import FORMATS, load_sae, write_saelens
from .load import format_of


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all arguments)\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Read one format, write another."""
    parser = _OneLineParser(prog="python -m hf_selortho.hub.interop", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    convert_parser = commands.add_parser("convert", help="Read an SAE in one format and write it in another.")
    convert_parser.add_argument("source", metavar="SRC", help="Folder or Hub id of the SAE.")
    convert_parser.add_argument("target", metavar="DST", help="Folder to write: new or empty.")
    convert_parser.add_argument("--to", required=True, choices=("saelens", "selortho"), help="Format to write.")
    convert_parser.add_argument("--from", dest="format", default="auto", choices=("auto", *FORMATS))
    convert_parser.add_argument("--revision", help="Branch, tag or commit of the SAE.")
    convert_parser.add_argument("--subfolder", help="Folder of the SAE within its repository.")
    arguments = parser.parse_args(argv)
    lookup = {key: getattr(arguments, key) for key in ("revision", "subfolder") if getattr(arguments, key)}
    convert(arguments.source, Path(arguments.target), arguments.to, arguments.format, lookup)
    sys.stdout.write(f"{arguments.target} holds it; load it with: {_snippet(arguments.target, arguments.to)}\n")


def convert(source: str, target: Path, to: str, format: str, lookup: dict[str, str]) -> None:
    """Read the SAE, write it to a folder beside the target, and rename that.

    Raises:
        SelOrthoError: the SAE cannot be read, or the target is not new or empty; nothing has been written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SelOrthoError(f"{target} is not empty: choose another folder")
    found = format_of(source, lookup) if format == "auto" else format
    sae = load_sae(source, found, **lookup)
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "saelens":
        write_saelens(sae, target)
        return
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_sae(sae, temporary)
        write_json(temporary / RUN, {"converted_from": {"format": found, "name": source, **lookup}})
        temporary.replace(target)
    except OSError as error:
        raise SelOrthoError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _snippet(target: str, to: str) -> str:
    if to == "saelens":
        return f"sae_lens.SAE.load_from_disk({target!r})"
    return f"hf_selortho.SelOrthoSAE.from_pretrained({target!r})"


if __name__ == "__main__":
    run_script(main)
