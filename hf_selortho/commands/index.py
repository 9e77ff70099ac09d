"""Build the feature index of an SAE, which the Space shows: what each feature and each pair does on held-out text.

selortho index runs/demo --tokens 2_000_000
selortho index org/gemma2b-l12 --output index/feature_index --dataset path/to/texts.jsonl
selortho index runs/demo --explain --explain_url http://127.0.0.1:8000/v1 --explain_model NAME
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.pair_history import read_pair_history
from ..data.sae_probes import is_installed
from ..data.texts import open_documents
from ..errors import SelOrthoError
from ..features.build import IndexSettings, Sources, build_feature_index, holds_index, in_words, weights_sha256
from ..features.explainer_client import ChatClient
from ..features.explanations import explain_index
from ..features.index_writer import FACTS, INDEX, IndexWriter, check_index_folder
from ..features.labels import read_labels
from ..hub.run_folder import holds_sae, read_run, shown_name, twin_beside
from ..language_models.loading import LanguageModel
from ..utils.hub import listed
from ..utils.memory import where_memory_ends
from .arguments import parse_index
from .reading import capture_of, least_tokens, load, load_lm_of, read_moved, text_source
from .reading_arguments import IndexArguments

LanguageModels = dict[tuple[str | None, str | None], LanguageModel]  # by name and revision
KEPT = "kept, as it was built with these settings; to build it again, name this SAE with --overwrite"


@dataclass(frozen=True)
class Target:
    """An SAE to build the index of."""

    source: str  # folder or Hub id
    name: str  # in the index
    folder: Path | None  # if it is local
    output: Path
    twin: str | None


@where_memory_ends("lower --max_pairs or --top_contexts, or use another --lm_dtype")
def main(argv: Sequence[str] | None = None) -> None:
    """Build the index of every SAE of a run, or of the one that is named."""
    arguments, rest = parse_index(argv)
    for output, words in build_indexes(rest.sae, arguments):
        sys.stdout.write(f"{output}: {words}\n")


def build_indexes(name: str, arguments: IndexArguments) -> Iterator[tuple[Path, str]]:
    """Build the index of every SAE that a folder or Hub id names; yield the folder of each and what is in it.

    Indexes that are there with the same settings, as an interrupted command leaves them, are kept.

    Raises:
        SelOrthoError: nothing can be built; whatever shows before the first text is read, before anything is written.
    """
    concepts = ("quick" if is_installed() else "none") if arguments.concepts == "auto" else arguments.concepts
    settings = IndexSettings(arguments.tokens, arguments.max_pairs, arguments.top_contexts, arguments.seed, concepts)
    client = None
    if arguments.explain:
        client = ChatClient(arguments.explain_url or "", arguments.explain_model or "", arguments.explain_budget)
    lms: LanguageModels = {}
    targets = find_targets(name, arguments)
    kept = [
        target
        for target in targets
        if (target.output / FACTS).exists() and (len(targets) > 1 or not arguments.overwrite)
        if holds_index(target.output, open_sources(target, arguments, lms), settings, replace=arguments.overwrite)
    ]
    for target in targets:
        if target in kept and client is None:
            yield target.output, KEPT
            continue
        sources = open_sources(target, arguments, lms)
        if target not in kept:
            with IndexWriter(target.output) as writer:
                facts = build_feature_index(sources, settings, writer)
            yield target.output, in_words(facts)
        if client is not None:
            yield target.output, explain_index(target.output, sources, client, arguments.explain_features)


def find_targets(name: str, arguments: IndexArguments) -> list[Target]:
    """Find the SAEs that a folder or Hub id names.

    Raises:
        SelOrthoError: there is none, an argument is for one SAE and there are several.
    """
    place = Path(name, arguments.subfolder or "")
    if Path(name).is_dir() and not place.is_dir():
        raise SelOrthoError(f"--subfolder {arguments.subfolder}: there is no folder {place}")
    if place.is_dir():
        own = holds_sae(place) or any(place.glob("layer_*/config.json"))  # else of another library
        folders = [place / sae.name for sae in read_run(place).saes] if own else [place]
        given = [option for option in ("output", "twin", "labels") if getattr(arguments, option)]
        if given and len(folders) > 1:
            raise SelOrthoError(f"--{given[0]}: {place} has several SAEs ({listed(f.name for f in folders)}): name one")
        targets = [_local_target(folder, arguments) for folder in folders]
    elif arguments.output:
        targets = [Target(name, name, None, Path(arguments.output), arguments.twin)]
    else:
        raise SelOrthoError(f"--output is needed: {name} is no folder of this machine to put {INDEX} into")
    for target in targets:
        if target.twin and os.path.realpath(target.twin) == os.path.realpath(target.source):
            raise SelOrthoError(f"--twin {target.twin} is the SAE itself: name the one trained without the penalty")
        check_index_folder(target.output)
    return targets


def _local_target(folder: Path, arguments: IndexArguments) -> Target:
    twin = str(arguments.twin or twin_beside(folder.resolve()) or "") or None
    return Target(str(folder), shown_name(folder), folder, Path(arguments.output or folder / INDEX), twin)


def open_sources(target: Target, arguments: IndexArguments, lms: LanguageModels) -> Sources:
    """Load an SAE and what stands beside it; language models are loaded once."""
    lookup = {"approximate": arguments.approximate} if target.folder else arguments.lookup
    sae = load(target.source, lookup, arguments.device)
    config, d_sae = sae.config, len(sae.b_enc)
    twin = load(target.twin, {}, arguments.device) if target.twin else None
    twin_folder = Path(target.twin) if target.twin and Path(target.twin).is_dir() else None
    labels = read_labels(Path(arguments.labels), d_sae) if arguments.labels else None
    source = text_source(config, arguments)
    documents = open_documents(source)
    key = (config.lm_name, config.lm_revision)
    if key not in lms:
        lms[key] = load_lm_of(config, arguments)
    return Sources(
        sae=sae,
        capture=capture_of(config, lms[key], arguments),
        documents=documents,
        name=target.name,
        weights_sha256=weights_sha256(sae, target.folder),
        twin=twin,
        twin_name=shown_name(twin_folder) if twin_folder else target.twin or "",
        twin_weights_sha256="" if twin is None else weights_sha256(twin, twin_folder),
        history=read_pair_history(target.folder, d_sae) if target.folder else (),
        labels=labels,
        min_tokens=least_tokens(config, arguments),
        text_settings=vars(source),
        moved=read_moved(target.source, lookup, d_sae),
    )
