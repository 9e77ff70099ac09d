"""English texts of the PyPI package sae-probes: labelled sets to probe with, and the embedded corpus "sae-probes".

The package belongs to Kantamneni et al. 2025, "Are Sparse Autoencoders Useful?" (arXiv:2502.16681). Only its data files
are read, the package is never imported.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..errors import SelOrthoError
from .text_source import SAE_PROBES

VERSION = "0.4.2"
INSTALL = f"pip install --no-deps {SAE_PROBES}=={VERSION}"
_TABLE_OF_SETS = "sae_probes/data/probing_datasets_MASTER.csv.zst"
_TABLES = "sae_probes/data/cleaned_data"

# What is trained on, by source; all other sets are never trained on, so that probing with them is clean. Sets that
# share texts are in the same source, and sets whose texts are parts of those of others are left out.
SOURCES: Mapping[str, tuple[str, ...]] = {
    "essays": ("94_ai_gen",),
    "news": ("100_news_fake", *(f"{n}_news_class_{c}" for n, c in ((139, "Politics"), (140, "Technology"))),
             "141_news_class_Entertainment"),
    "forum": ("48_cm_correct", "49_cm_isshort"),
    "encyclopedia": (
        "56_wikidatasex_or_gender", "57_wikidatais_alive", "58_wikidatapolitical_party",
        *(f"{59 + n}_wikidata_occupation_is{job}" for n, job in enumerate(
            ("journalist", "athlete", "actor", "politician", "singer", "researcher"))),
    ),
    "reviews": ("157_amazon_5star", "111_yelp_data"),
    "passages": ("90_glue_qnli", "89_glue_mrpc"),
    "questions": ("91_glue_qqp", "36_sciq_tf", "44_phys_tf", "47_reasoning_tf", "54_cs_tf"),
    "sentences": ("110_aimade_humangpt3",),
    "medicine": ("145_disease_class_digestive system diseases", "146_disease_class_cardiovascular diseases",
                 "147_disease_class_nervous system diseases"),
    "tweets": ("148_twt_emotion_worry", "149_twt_emotion_happiness", "150_twt_emotion_sadness"),
    "code": ("158_code_C", "159_code_Python", "160_code_HTML"),
    "web": ("65_high-school", "66_living-room", "67_social-security", "68_credit-card", "69_blood-pressure",
            "70_prime-factors", "71_social-media", "72_gene-expression", "73_control-group", "74_magnetic-field",
            "75_cell-lines"),
}  # fmt: skip
TRAINED_ON = frozenset(name for names in SOURCES.values() for name in names)
_OF_A_TEXT, _OF_A_SOURCE = 2_000, 2_000_000  # characters at most


@dataclass(frozen=True)
class ProbeSet:
    """Texts of two classes, as many of each."""

    name: str  # such as "95_toxic_is"
    texts: list[str]
    labels: np.ndarray  # (texts,) int64, 0 or 1
    classes: tuple[str, str]  # what 0 and 1 are called

    @property
    def trained_on(self) -> bool:
        """Whether the corpus "sae-probes" holds these texts."""
        return self.name in TRAINED_ON


def is_installed() -> bool:
    """Tell whether the texts are on this machine, in the version that is read."""
    try:
        _package()
    except SelOrthoError:
        return False
    return True


@functools.cache
def probe_set_names() -> tuple[str, ...]:
    """Names of the 113 sets of two classes, in the order of the package's table of contents.

    Raises:
        SelOrthoError: the package is missing, of another version or damaged.
    """
    rows = _read_table(_TABLE_OF_SETS, "Dataset save name", "Data type")
    return tuple(Path(name).stem for name, kind in rows if kind == "Binary Classification")


def read_probe_set(name: str) -> ProbeSet:
    """Read a set by its name.

    Raises:
        SelOrthoError: there is no such set; the package is missing, of another version or damaged.
    """
    if name not in probe_set_names():
        raise SelOrthoError(
            f"there is no probe set {name!r:.80}: expected one such as {', '.join(probe_set_names()[:3])}"
        )
    texts, targets = _columns(name)
    classes, labels = np.unique(np.array(targets), return_inverse=True)
    return ProbeSet(name, texts, labels.astype(np.int64), (str(classes[0]), str(classes[1])))


@functools.cache
def sae_probes_texts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the texts of the corpus and the source of each (a key of `SOURCES`), shuffled by the hash of the text.

    No text occurs twice and none is in a set that is not trained on; long ones are cut after 2,000 characters. Of a
    source there are at most 2 million characters. Takes some seconds, then stays in memory.

    Raises:
        SelOrthoError: the package is missing, of another version or damaged.
    """
    sources: dict[str, str] = {}
    for source, names in SOURCES.items():
        for name in names:
            sources.update(dict.fromkeys(_columns(name)[0], source))
    for name in probe_set_names():
        if name not in TRAINED_ON:
            for text in _columns(name)[0]:
                sources.pop(text, None)
    left = dict.fromkeys(SOURCES, _OF_A_SOURCE)
    kept: dict[str, str] = {}
    for text in sorted(sources, key=_hash):
        piece, source = text[:_OF_A_TEXT].strip(), sources[text]
        if piece and left[source] >= len(piece) and piece not in kept:
            left[source] -= len(piece)
            kept[piece] = source
    return tuple(kept), tuple(kept.values())


def sae_probes_revision() -> str:
    """Name the package's version and a hash of the texts of the corpus."""
    digest = hashlib.sha256("\0".join(sae_probes_texts()[0]).encode("utf-8", "surrogatepass")).hexdigest()
    return f"{VERSION}-sha256:{digest[:16]}"


def _hash(text: str) -> bytes:
    # Not the hash of the text alone: by that one documents are held out, and the first by it would all be.
    return hashlib.sha256(f"{SAE_PROBES}\0{text}".encode("utf-8", "surrogatepass")).digest()


def _columns(name: str) -> tuple[list[str], list[str]]:
    """Return texts and class names of a table."""
    rows = list(_read_table(f"{_TABLES}/{name}.csv.zst", "prompt", "target"))
    return [text for text, _ in rows], [target for _, target in rows]


def _read_table(path: str, *columns: str) -> Iterator[tuple[str, ...]]:
    file = Path(str(_package().locate_file(path)))
    try:
        with pa.input_stream(str(file), compression="zstd") as stream:
            text = stream.read().decode("utf-8")
        for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
            yield tuple(row[column] for column in columns)
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise SelOrthoError(
            f"{file.name} of {SAE_PROBES} is missing or damaged: run `{INSTALL} --force-reinstall`"
        ) from error


def _package() -> Distribution:
    try:
        package = distribution(SAE_PROBES)
    except PackageNotFoundError as error:
        raise SelOrthoError(f"the texts of {SAE_PROBES} are not installed: run `{INSTALL}`") from error
    if package.version != VERSION:
        raise SelOrthoError(f"{SAE_PROBES} {package.version} is installed, {VERSION} is read: run `{INSTALL}`")
    return package
