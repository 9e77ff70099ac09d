"""Cards of datasets: shards of activations, and examples of features. Same rules as the model card's facts.

Every foreign string is made safe; what is unknown is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ..data.cache_manifest import Manifest
from .card_facts import EMBEDDED_MODEL, EMBEDDED_ORIGIN, hub_id, under_gemma_terms
from .markdown import cell, code, literal, number, one_line

_FOLDER = Path(__file__).parent
# The Hub's words for how many rows a dataset has.
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)


def render_shards_card(manifest: Manifest, repo_id: str | None = None, license: str | None = None) -> DatasetCard:
    """Render the card of a folder of cached activations.

    Args:
        manifest: of the folder.
        repo_id: where on the Hub it will be; the commands of the card read it from there, else from FOLDER.
        license: of the activations, in the Hub's spelling; only their publisher can grant one.
    """
    model, text, contexts = manifest.model, manifest.text, manifest.contexts
    counts, layers = manifest.counts, manifest.layers
    data = _data(
        f"Activations of {model.name}",
        ["activations", "sparse-autoencoder"],
        counts.rows + manifest.held_out_counts.rows,
        [hub_id(text.dataset, text.revision)],
        license,
    )
    rows = [
        ("Language model", cell(model.name) + _at(model.revision)),
        ("Layers", ", ".join(map(number, layers)) + ", the residual stream after each, counted from 0"),
        ("Width", number(manifest.layer(layers[0]).d_in)),
        ("Stored as", cell(manifest.stored_dtype) + f", computed in {cell(model.dtype)}"),
        ("Text", cell(text.dataset) + _at(text.revision)),
        ("Split", cell(text.split) if text.split else None),
        ("Tokens for training", f"{number(counts.rows, 'count')} of {number(counts.contexts, 'count')} contexts"),
        ("Tokens held out", number(manifest.held_out_counts.rows, "count")),
        ("Contexts", f"up to {number(contexts.context_length)} tokens{_bos(contexts.prepend_bos)}"),
        ("Special tokens left out", number(counts.dropped_special, "count")),
        ("Sink tokens left out", number(counts.dropped_sinks, "count") + _limit(manifest.max_norm_ratio)),
        (
            "Ends of documents left out",
            f"{number(counts.dropped_tails, 'count')}, shorter than {number(contexts.min_tokens)} tokens",
        ),
    ]
    context = {
        "lm": code(model.name),
        "text": code(text.dataset),
        "rows": [(name, value) for name, value in rows if value],
        "layers": " ".join(map(str, layers)),
        "place": f"hub:{one_line(repo_id)}" if repo_id else "FOLDER",
        "literal": literal(f"hub:{repo_id}" if repo_id else "FOLDER"),
        "published": repo_id is not None,
        **_terms(model.name, license),
    }
    return _render(data, "shards_card_template.md", context)


def size_category(rows: int) -> str:
    """The Hub's word for a number of rows."""
    return next((name for limit, name in _SIZES if rows < limit), "n>1T")


def _data(name: str, tags: list[str], rows: int, sources: Sequence[str | None], license: str | None) -> DatasetCardData:
    known = [source for source in sources if source]
    return DatasetCardData(
        pretty_name=one_line(name),
        tags=[*tags, "hf_selortho"],
        size_categories=[size_category(rows)],
        source_datasets=known or None,
        license=one_line(license) if license else None,
    )


def _render(data: DatasetCardData, template: str, context: Mapping[str, Any]) -> DatasetCard:
    text = (_FOLDER / template).read_text(encoding="utf-8")
    card = DatasetCard.from_template(data, template_str=text, **context)
    card.text = card.text.rstrip() + "\n"
    return card


def _terms(lm: str, license: str | None) -> dict[str, Any]:
    return {
        "license_name": code(license) if license else None,
        "under_gemma_terms": under_gemma_terms(lm),
        "embedded_origin": EMBEDDED_ORIGIN if lm == EMBEDDED_MODEL else None,
    }


def _at(revision: Any) -> str:
    return f" at revision {cell(revision)}" if revision else ""


def _bos(prepend_bos: bool) -> str:
    return ", starting with BOS, whose activation is left out" if prepend_bos else ", without BOS"


def _limit(ratio: Any) -> str:
    return f", of a norm above {number(ratio, 'exact')} times the median" if ratio else ""
