"""Arguments of the commands, in a module that imports nothing heavy: --help and slips do not wait for what runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ..training.arguments import PublicIds, parse_arguments
from ..training.cache_arguments import parse_cache_arguments
from ..training.contradictions import EVALUATE, INDEX, PUSH, SPACE
from ..utils.options import OneLineParser, argument, parse_options
from ..utils.sae_formats import FORMATS, SETS, TARGETS
from .reading_arguments import APPROXIMATE, EvaluateArguments, IndexArguments


@dataclass
class PushArguments(PublicIds):
    """Where to, and what beside the weights. The access token is that of `hf auth login`, or HF_TOKEN."""

    repo_id: str = argument(None, "Repository of the Hub, owner/name; it is created if there is none.")
    private: bool = argument(False, "Make a new repository private.")
    revision: str | None = argument(None, "Branch to push to; it is created if there is none.")
    create_pr: bool = argument(False, "Propose the change as a pull request instead of making it.")
    overwrite: bool = argument(False, "Replace files that somebody else has changed on the Hub since the last push.")
    include_index: bool = argument(False, "Take the feature index along, where one was built.")
    license: str | None = argument(None, "Licence of the weights, in the Hub's spelling: apache-2.0, gemma, other, ...")
    license_link: str | None = argument(None, "Address of its text, where it is not one of the Hub's list.")
    twin: str | None = argument(None, "Run without the penalty to compare with; default: the folder RUN-twin.")
    seeds: list[str] = argument([], "The same run with other seeds: the card shows means and spread.")
    template: str | None = argument(None, "Another template of the model card.")
    saelens: bool = argument(True, "Add an export that SAELens loads, which doubles the size.")
    commit_message: str | None = argument(None, "Title of the commit.")
    dry_run: bool = argument(False, "List the files and print the card; nothing is sent.")


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


parse_evaluate = partial(parse_options, EvaluateArguments, table=EVALUATE, sae="Folder or Hub id of the SAE.")
parse_index = partial(
    parse_options, IndexArguments, table=INDEX, sae="Folder of an SAE or of a run, or Hub id of an SAE."
)
parse_push = partial(parse_options, PushArguments, table=PUSH, run="Folder of the run, or of `selortho cache`.")
parse_space = partial(parse_options, SpaceArguments, table=SPACE)


def parse_browse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line into what the page of an SAE is launched with."""
    from ..browser.options import add_options, default_of  # Gradio may be missing: one line says so

    parser = OneLineParser()
    parser.add_argument(
        "sae",
        nargs="?",
        default=default_of("sae"),
        help="folder of an SAE or of a run, or owner/name[@revision][/subfolder] of the Hub",
    )
    add_options(parser)
    return parser.parse_args(argv)


def parse_convert(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line into what an SAE is converted from and to."""
    parser = OneLineParser()
    parser.add_argument(
        "source",
        metavar="SRC",
        help="Folder or Hub id of the SAE (access token: HF_TOKEN); of circuit-tracer: folder of a run or set.",
    )
    parser.add_argument("target", metavar="DST", help="Folder to write: new or empty.")
    parser.add_argument("--to", required=True, choices=TARGETS, help="Format to write.")
    parser.add_argument(
        "--from",
        dest="format",
        default="auto",
        choices=("auto", *FORMATS, *SETS),
        help="Format of SRC; auto: by its files.",
    )
    parser.add_argument("--revision", help="Branch, tag or commit of the SAE.")
    parser.add_argument("--subfolder", help="Folder of the SAE within its repository.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a converted SAE that is in DST.")
    parser.add_argument("--approximate", action="store_true", help=APPROXIMATE)
    return parser.parse_args(argv)


def parse_info(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line into which SAE is asked for."""
    parser = OneLineParser()
    parser.add_argument("sae", help="Folder, file of weights or Hub id of the SAE (access token: HF_TOKEN).")
    parser.add_argument("--revision", help="Branch, tag or commit of the SAE.")
    parser.add_argument("--subfolder", help="Folder of the SAE within its repository.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    return parser.parse_args(argv)


PARSERS = {
    "train": parse_arguments,
    "cache": parse_cache_arguments,
    "evaluate": parse_evaluate,
    "index": parse_index,
    "browse": parse_browse,
    "push": parse_push,
    "space": parse_space,
    "info": parse_info,
    "convert": parse_convert,
}
