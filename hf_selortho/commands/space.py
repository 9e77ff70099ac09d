"""Put up a Space that shows the features of an SAE: the feature browser with pinned requirements and settings.

selortho space --space org/gemma2b-features --sae org/gemma2b-l12 --dry_run
selortho space --space org/gemma2b-features --sae org/gemma2b/layer_12 --twin org/gemma2b/layer_12_twin
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from huggingface_hub import constants

from ..errors import SelOrthoError
from ..hub.publication import Publication
from ..hub.space import advice, assemble_space, check_wheel_url, deploy_space, pin_sae
from ..utils.files import temporary_folder
from .arguments import SpaceArguments, parse_space

logger = logging.getLogger("hf_selortho.space")

MADE = ("requirements.txt", "settings.json", "README.md")  # for this Space; all else is the app's


def main(argv: Sequence[str] | None = None) -> None:
    """Look at the SAE, put the Space together, send it."""
    arguments, _ = parse_space(argv)
    for name in ("space", "sae"):
        if not getattr(arguments, name):
            raise SelOrthoError(f"--{name} is missing: expected owner/name of the Hub")
    if arguments.wheel_url:
        check_wheel_url(arguments.wheel_url)
    names = {"sae": arguments.sae, "twin": arguments.twin}
    saes = {role: pin_sae(name, arguments.token) for role, name in names.items() if name}
    with temporary_folder("hf_selortho-space-") as folder:
        publication = assemble_space(
            folder,
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
