"""Put up a Space that shows the features of an SAE: the feature browser with pinned requirements and settings.

python scripts/deploy_space.py --space org/gemma2b-features --sae org/gemma2b-l12 --dry_run
python scripts/deploy_space.py --space org/gemma2b-features --sae org/gemma2b/layer_12 --twin org/gemma2b/layer_12_twin
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from hf_selortho.errors import SelOrthoError
from hf_selortho.hub.publication import Publication, size_in_words, size_table
from hf_selortho.hub.push import check_repo_id
from hf_selortho.hub.space import assemble_space, deploy_space, is_private, no_private_wheel
from hf_selortho.hub.space_requirements import OwnPackage, build_wheel, check_wheel_url
from hf_selortho.hub.space_saes import SpaceSaes, advice, pin_sae
from hf_selortho.training.arguments import OneLineParser, argument
from hf_selortho.utils.command_line import run_script

logger = logging.getLogger("hf_selortho.deploy_space")

ROOT = Path(__file__).resolve().parents[1]
MADE = ("requirements.txt", "settings.json", "README.md")  # for this Space; all else is the app's


@dataclass
class SpaceArguments:
    """Where to, and what is shown."""

    space: str = argument(None, "The Space, owner/name; it is created if there is none.")
    sae: str = argument(None, "The SAE on the Hub, owner/name[@revision][/subfolder]; its commit of now is pinned.")
    twin: str | None = argument(None, "An SAE trained without the penalty, on the Hub, to compare with.")
    title: str | None = argument(None, "Title of the Space.")
    private: bool = argument(False, "Make a new Space private; it then needs --wheel_url or --from_index.")
    wheel_url: str | None = argument(None, "Address of our wheel, readable by everybody, in place of one in the Space.")
    from_index: bool = argument(False, "Let pip take this version of hf_selortho from its index of packages.")
    overwrite: bool = argument(False, "Replace another app, or files that somebody else has changed on the Hub.")
    create_pr: bool = argument(False, "Propose the change as a pull request instead of making it.")
    commit_message: str | None = argument(None, "Title of the commit.")
    token: str | None = argument(None, "Access token; default: that of `hf auth login`, or HF_TOKEN.")
    dry_run: bool = argument(False, "List the files with their sizes; nothing is sent.")


def main(argv: Sequence[str] | None = None) -> None:
    """Look at the SAE, put the Space together, send it."""
    groups: list[Any] = [SpaceArguments]
    parser = OneLineParser(groups, allow_abbrev=False)
    (arguments,) = parser.parse_args_into_dataclasses(list(sys.argv[1:] if argv is None else argv))
    for name in ("space", "sae"):
        if not getattr(arguments, name):
            parser.error(f"--{name} is missing")
    check_arguments(arguments)
    sae = pin_sae(arguments.sae, arguments.token)
    saes = SpaceSaes(sae, pin_sae(arguments.twin, arguments.token) if arguments.twin else None)
    with tempfile.TemporaryDirectory(prefix="hf_selortho-space-") as scratch:
        wheel, folder = Path(scratch, "wheel"), Path(scratch, "space")
        own = own_package(arguments, wheel)
        publication = assemble_space(ROOT / "spaces_app", folder, arguments.space, saes, own, arguments.title)
        if arguments.dry_run:
            sys.stdout.write(listing(publication, arguments.space))
        else:
            deploy(publication, own, arguments)
        for sentence in advice(saes, arguments.token):
            sys.stdout.write(f"note: {sentence}\n")


def check_arguments(arguments: SpaceArguments) -> None:
    """Raise a SelOrthoError if arguments contradict one another, or the Space could not install hf_selortho."""
    check_repo_id(arguments.space)
    if arguments.wheel_url and arguments.from_index:
        raise SelOrthoError("--wheel_url and --from_index both say where hf_selortho comes from: choose one")
    if arguments.wheel_url:
        check_wheel_url(arguments.wheel_url)
    elif not arguments.from_index and (arguments.private or is_private(arguments.space, arguments.token)):
        raise no_private_wheel(arguments.space)


def own_package(arguments: SpaceArguments, folder: Path) -> OwnPackage:
    """Where the Space gets hf_selortho from; its wheel is built unless the user names another place."""
    if arguments.wheel_url or arguments.from_index:
        return OwnPackage(url=arguments.wheel_url)
    return OwnPackage(wheel=build_wheel(ROOT, folder))


def deploy(publication: Publication, own: OwnPackage, arguments: SpaceArguments) -> None:
    """Send it, and say what has come of it."""
    logger.info("%s, to %s", size_in_words(publication), arguments.space)
    pushed = deploy_space(
        publication,
        arguments.space,
        own,
        private=arguments.private,
        overwrite=arguments.overwrite,
        create_pr=arguments.create_pr,
        commit_message=arguments.commit_message,
        token=arguments.token,
    )
    if pushed.left:
        logger.info("not part of this, and left as they are: %s", ", ".join(pushed.left))
    sys.stdout.write(f"{pushed.in_words}\n")
    if not arguments.create_pr:
        sys.stdout.write(f"the page, once it is built: {constants.ENDPOINT}/spaces/{arguments.space}\n")


def listing(publication: Publication, space: str) -> str:
    """The files with their sizes, and the text of those that were made for this Space."""
    texts = [f"{name}:\n\n{(publication.folder / name).read_text(encoding='utf-8')}" for name in MADE]
    return "\n".join([*size_table(publication, space), "", *texts])


if __name__ == "__main__":
    run_script(main)
