"""Build the feature index of an SAE, which the Space shows: what each feature and each pair does on held-out text.

python scripts/build_feature_index.py runs/demo --tokens 2_000_000
python scripts/build_feature_index.py org/gemma2b-l12 --output index/feature_index --dataset path/to/texts.jsonl
python scripts/build_feature_index.py runs/demo/layer_8 --benchmark --tokens 50_000
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.data.contexts import count_tokens
from hf_selortho.data.pair_history import PairSnapshot, read_pair_history
from hf_selortho.data.texts import open_documents
from hf_selortho.features.build import build_feature_index, chosen_pairs, gather, gathered
from hf_selortho.features.index_writer import FACTS, INDEX, IndexWriter, check_index_folder
from hf_selortho.features.labels import read_labels
from hf_selortho.features.sources import IndexSettings, Sources
from hf_selortho.features.text_pass import taken, weights_sha256
from hf_selortho.formats import load_sae
from hf_selortho.hub.reading import ReadingArguments, capture_of, least_tokens, load_lm_of, text_source
from hf_selortho.hub.run_folder import holds_sae, read_run, shown_name, twin_beside
from hf_selortho.language_models.loading import LanguageModel
from hf_selortho.training.arguments import OneLineParser, argument
from hf_selortho.utils.command_line import run_script

logger = logging.getLogger("hf_selortho.build_feature_index")

BENCHMARK_ROUNDS = 3


@dataclass
class IndexArguments(ReadingArguments):
    """What to build, and on what text; whatever is not given is taken from the SAE's config."""

    twin: str | None = argument(
        None, "Folder or Hub id of the SAE trained without the penalty; default: the one beside it, NAME_twin."
    )
    output: str | None = argument(None, f"Folder of the index; default: {INDEX} in the folder of the SAE.")
    overwrite: bool = argument(False, "Replace the index that is there.")
    tokens: int = argument(1_000_000, "Tokens of held-out text to read, as 2_000_000 or 2000000.")
    max_pairs: int = argument(5000, "Pairs in the index at most, the strongest.")
    top_contexts: int = argument(10, "Strongest contexts kept of each feature.")
    labels: str | None = argument(None, 'JSON file of labels by feature: {"12": "import statements"}.')
    seed: int = argument(0, "Seed of the contexts drawn at random.")
    benchmark: bool = argument(False, "Build nothing; time the pass against the harvest of the same activations.")


@dataclass(frozen=True)
class Target:
    """An SAE to build the index of."""

    source: str  # folder or Hub id
    name: str  # in the index
    folder: Path | None  # if it is local
    output: Path | None  # None: nothing is written
    twin: str | None


def main(argv: Sequence[str] | None = None) -> None:
    """Build the index of every SAE of a run, or of the one that is named."""
    groups: list[Any] = [IndexArguments]
    parser = OneLineParser(groups, allow_abbrev=False)
    parser.add_argument("sae", help="Folder of an SAE or of a run of several, or Hub id of an SAE.")
    arguments, rest, unknown = parser.parse_args_into_dataclasses(
        list(sys.argv[1:] if argv is None else argv), return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    settings = IndexSettings(arguments.tokens, arguments.max_pairs, arguments.top_contexts, arguments.seed)
    found = targets(rest.sae, arguments)
    lms: dict[tuple[str | None, str | None], LanguageModel] = {}
    for target in found:
        sources = open_sources(target, arguments, lms)
        if arguments.benchmark:
            sys.stdout.write(benchmark(sources, settings) + "\n")
            continue
        assert target.output is not None
        with IndexWriter(target.output) as writer:
            facts = build_feature_index(sources, settings, writer)
        sys.stdout.write(f"{target.output}: {in_words(facts)}\n")


def targets(name: str, arguments: IndexArguments) -> list[Target]:
    """The SAEs that a folder or Hub id names.

    Raises:
        SelOrthoError: there is none, an argument is for one SAE and there are several, or the output is taken.
    """
    place = Path(name, arguments.subfolder or "")
    if Path(name).is_dir() and not place.is_dir():
        raise SelOrthoError(f"--subfolder {arguments.subfolder}: there is no folder {place}")
    folders: list[Path | None] = [place] if place.is_dir() else []
    if place.is_dir() and (holds_sae(place) or any(place.glob("layer_*"))):
        folders = [place / sae.name for sae in read_run(place).saes]
    if len(folders) > 1:
        given = [option for option in ("output", "twin", "labels") if getattr(arguments, option)]
        if given:
            raise SelOrthoError(f"--{given[0]}: {place} has several SAEs, {_names(folders)}; name the folder of one")
    if not folders and not arguments.output and not arguments.benchmark:
        raise SelOrthoError(f"--output is needed: {name} is no folder of this machine to put {INDEX} into")
    found = []
    for folder in folders or [None]:
        output = Path(arguments.output) if arguments.output else None if folder is None else folder / INDEX
        twin = arguments.twin or (folder and twin_beside(folder.resolve()))
        source, shown = (name, name) if folder is None else (str(folder), shown_name(folder))
        found.append(
            Target(source, shown, folder, None if arguments.benchmark else output, str(twin) if twin else None)
        )
    for target in found:
        check_output(target.output, arguments.overwrite)
    return found


def check_output(output: Path | None, overwrite: bool) -> None:
    """Refuse to replace what is no index, or an index without being told to."""
    if output is None:
        return
    check_index_folder(output)
    if (output / FACTS).exists() and not overwrite:
        raise SelOrthoError(f"{output} holds an index: replace it with --overwrite, or choose another --output")


def open_sources(
    target: Target, arguments: IndexArguments, lms: dict[tuple[str | None, str | None], LanguageModel]
) -> Sources:
    """Load an SAE and what stands beside it; language models are loaded once."""
    sae = loaded(target.source, {} if target.folder else arguments.lookup, arguments.device)
    config: SelOrthoConfig = sae.config
    labels = read_labels(Path(arguments.labels), len(sae.b_enc)) if arguments.labels else None
    history: list[PairSnapshot] = []
    if target.folder is not None:
        history = read_pair_history(target.folder, len(sae.b_enc))
    twin = loaded(target.twin, {}, arguments.device) if target.twin else None
    twin_folder = Path(target.twin) if target.twin and Path(target.twin).is_dir() else None
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
        history=history,
        labels=labels,
        min_tokens=least_tokens(config, arguments),
        dataset_config=source.dataset_config,
    )


def loaded(name: str, lookup: Mapping[str, str], device: str) -> SelOrthoSAE:
    """An SAE of any format, ready to encode."""
    sae: Any = load_sae(name, **lookup)
    return sae.to(device).eval()


def benchmark(sources: Sources, settings: IndexSettings) -> str:
    """Median speed of the pass and of the harvest of the same contexts, in turns, and of their ratio."""
    pairs = chosen_pairs(sources, settings, progress=False)
    contexts = list(taken(sources.contexts(), settings.tokens, sources.sae.config.prepend_bos))

    def harvest() -> None:
        for _ in sources.capture.capture_batches(contexts):
            pass

    def build() -> None:
        gather(sources, settings, gathered(sources, settings, pairs), progress=False)

    harvest()  # the first forward of a kind is slow
    rounds = [(_timed(harvest), _timed(build)) for _ in range(BENCHMARK_ROUNDS)]
    tokens = count_tokens(contexts)
    speeds = [median(tokens / taken[which].wall for taken in rounds) for which in (0, 1)]
    wall, processor = (
        [getattr(one, kind) / getattr(both, kind) for one, both in rounds] for kind in ("wall", "processor")
    )
    return (
        f"{sources.name}: {tokens:,} tokens, {len(pairs):,} pairs, {'a' if sources.twin else 'no'} twin: harvest "
        f"{speeds[0]:,.0f} tokens/s, pass of the index {speeds[1]:,.0f} tokens/s, ratio {median(wall):.2f} (of each "
        f"round: {', '.join(f'{ratio:.2f}' for ratio in wall)}; by processor time {median(processor):.2f})"
    )


@dataclass(frozen=True)
class Seconds:
    """How long something took."""

    wall: float
    processor: float


@torch.inference_mode()
def _timed(work: Callable[[], None]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def in_words(facts: Mapping[str, Any]) -> str:
    """What has been built, in a line."""
    text, pairs, features = facts["text"], facts["pairs"], facts["features"]
    classes = ", ".join(f"{number:,} {name}" for name, number in pairs["classes"].items() if number)
    return (
        f"{facts['sae']['d_sae']:,} features, {features['never_fired']:,} of which never fired; {pairs['kept']:,} pairs"
        f"{f' ({classes})' if classes else ''}; from {text['tokens']:,} tokens of {text['documents']:,} documents"
    )


def _names(folders: Sequence[Path | None]) -> str:
    return ", ".join(folder.name for folder in folders if folder)


if __name__ == "__main__":
    run_script(main)
