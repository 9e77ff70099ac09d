"""Publish on the Hugging Face Hub: the SAEs of a run with card, metrics and pictures, or cached activations.

selortho push runs/demo --repo_id org/gemma-3-270m-l8 --dry_run
selortho push runs/layers --repo_id org/gemma2b --private --license gemma
selortho push acts --repo_id org/acts --model_id org/lm --dataset_id org/texts
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.cache_manifest import MANIFEST
from ..errors import SelOrthoError
from ..hub.publication import Publication, publish_cache, publish_run
from ..hub.push import push_folder
from ..hub.repository import RepoKind
from ..hub.run_folder import read_run, with_others
from ..training.arguments import PublicIds
from ..utils.command_line import program
from ..utils.files import temporary_folder
from .arguments import PushArguments, parse_push

logger = logging.getLogger("hf_selortho.push")
_OF_SAES = ("include_index", "license_link", "twin", "seeds", "template")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the run or the cache, assemble what is published, send it."""
    arguments, rest = parse_push(argv)
    if not arguments.repo_id:
        raise SelOrthoError("--repo_id is missing: the repository to publish in, owner/name")
    with temporary_folder("hf_selortho-push-") as folder:
        publication = assemble(Path(rest.run), folder, arguments)
        if arguments.dry_run:
            sys.stdout.write(f"{publication.listing(arguments.repo_id)}\nREADME.md:\n\n{publication.card}")
        else:
            push(publication, arguments)


def assemble(source: Path, folder: Path, arguments: PushArguments) -> Publication:
    """Put together what is published of a run or a cache.

    Raises:
        SelOrthoError: as [`publish_run`] and [`publish_cache`], or an option is for SAEs and there are none.
    """
    ids = PublicIds(arguments.model_id, arguments.dataset_id)
    if (source / MANIFEST).is_file():
        asked = [name for name in _OF_SAES if getattr(arguments, name)]
        asked += [] if arguments.saelens else ["no_saelens"]
        if asked:
            raise SelOrthoError(f"--{asked[0]}: {source} holds cached activations, and no SAE: leave it out")
        return publish_cache(source, folder, arguments.repo_id, license=arguments.license, ids=ids)
    twin = Path(arguments.twin) if arguments.twin else None
    return publish_run(
        with_others(read_run(source), twin, [Path(seed) for seed in arguments.seeds]),
        folder,
        arguments.repo_id,
        saelens=arguments.saelens,
        include_index=arguments.include_index,
        license=arguments.license,
        license_link=arguments.license_link,
        template=arguments.template,
        ids=ids,
    )


def push(publication: Publication, arguments: PushArguments) -> None:
    """Send it, and say what has come of it."""
    logger.info("%s, to %s", publication, arguments.repo_id)
    kind: RepoKind = "dataset" if MANIFEST in publication.sizes else "model"
    pushed = push_folder(
        publication.folder,
        arguments.repo_id,
        kind=kind,
        private=arguments.private or None,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        overwrite=arguments.overwrite,
        commit_message=arguments.commit_message,
    )
    if pushed.left:
        logger.info("not part of this run, and left as they are: %s", ", ".join(pushed.left))
    sys.stdout.write(f"{pushed}\n")
    if kind == "dataset":
        at = f"@{arguments.revision}" if arguments.revision else ""
        command = f"{program('selortho')} train --activations hub:{arguments.repo_id}{at}"
        sys.stdout.write(f"train on it with: {command} ...\n")
    elif not arguments.create_pr:
        folders = sorted(str(Path(name).parent) for name in publication.sizes if Path(name).name == "config.json")
        extra = "" if "." in folders else f", subfolder={folders[0]!r}"
        revision = f", revision={arguments.revision!r}" if arguments.revision else ""
        sys.stdout.write(f"load it with: SelOrthoSAE.from_pretrained({arguments.repo_id!r}{extra}{revision})\n")
