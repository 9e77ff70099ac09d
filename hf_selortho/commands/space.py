"""Put up a Space that shows the features of an SAE: the feature browser with pinned requirements and settings.

selortho space --space org/gemma2b-features --sae org/gemma2b-l12 --dry_run
selortho space --space org/gemma2b-features --sae org/gemma2b/layer_12 --twin org/gemma2b/layer_12_twin
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from ..errors import SelOrthoError
from ..hub.publication import Publication
from ..hub.space import advice, assemble_space, check_wheel_url, deploy_space, pin_sae
from ..utils.hub import check_repo_id
from ..utils.options import argument, parse_options

logger = logging.getLogger("hf_selortho.space")

MADE = ("requirements.txt", "settings.json", "README.md")  # for this Space; all else is the app's


@dataclass
class SpaceArguments:
    """Where to, and what is shown."""

    space: str = argument(None, "The Space, owner/name; it is created if there is none.")
    sae: str = argument(None, "The SAE on the Hub, owner/name[@revision][/subfolder]; its commit of now is pinned.")
    twin: str | None = argument(None, "An SAE trained without the penalty, on the Hub, to compare with.")
    title: str | None = argument(None, "Title of the Space.")
    private: bool = argument(False, "Make a new Space private.")
    wheel_url: str | None = argument(None, "Install hf_selortho from this wheel, which everybody can read.")
    from_index: bool = argument(False, "Install hf_selortho from pip's index of packages.")
    overwrite: bool = argument(False, "Replace another app, or files that somebody else has changed on the Hub.")
    create_pr: bool = argument(False, "Propose the change as a pull request instead of making it.")
    commit_message: str | None = argument(None, "Title of the commit.")
    token: str | None = argument(None, "Access token; default: that of `hf auth login`, or HF_TOKEN.")
    dry_run: bool = argument(False, "List the files with their sizes; nothing is sent.")


def main(argv: Sequence[str] | None = None) -> None:
    """Look at the SAE, put the Space together, send it."""
    arguments, _ = parse_options(SpaceArguments, argv)
    for name in ("space", "sae"):
        if not getattr(arguments, name):
            raise SelOrthoError(f"--{name} is missing: expected owner/name of the Hub")
    check_repo_id(arguments.space)
    if arguments.wheel_url and arguments.from_index:
        raise SelOrthoError("--wheel_url and --from_index both say where hf_selortho comes from: choose one")
    if arguments.wheel_url:
        check_wheel_url(arguments.wheel_url)
    names = {"sae": arguments.sae, "twin": arguments.twin}
    saes = {role: pin_sae(name, arguments.token) for role, name in names.items() if name}
    with tempfile.TemporaryDirectory(prefix="hf_selortho-space-") as folder:
        publication = assemble_space(
            Path(folder),
            saes,
            title=arguments.title,
            wheel_url=arguments.wheel_url,
            from_index=arguments.from_index,
        )
        if arguments.dry_run:
            texts = [f"{name}:\n\n{(publication.folder / name).read_text(encoding='utf-8')}" for name in MADE]
            sys.stdout.write("\n".join([publication.listing(arguments.space), *texts]))
        else:
            deploy(publication, arguments)
        for sentence in advice(saes, arguments.token):
            sys.stdout.write(f"note: {sentence}\n")


def deploy(publication: Publication, arguments: SpaceArguments) -> None:
    """Send it, and say what has come of it."""
    logger.info("%s, to %s", publication, arguments.space)
    pushed = deploy_space(
        publication,
        arguments.space,
        private=arguments.private,
        overwrite=arguments.overwrite,
        create_pr=arguments.create_pr,
        commit_message=arguments.commit_message,
        token=arguments.token,
    )
    if pushed.left:
        logger.info("not part of this, and left as they are: %s", ", ".join(pushed.left))
    sys.stdout.write(f"{pushed}\n")
    if not arguments.create_pr:
        sys.stdout.write(f"the page, once it is built: {constants.ENDPOINT}/spaces/{arguments.space}\n")
