"""Write the card of a dataset of cached activations: what its manifest says, in the layout of a Jinja template."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from ..data.cache_manifest import Manifest
from .markdown import Markdown, code, one_line, render
from .model_card import hub_id, terms_of

_TEMPLATE = Path(__file__).with_name("shards_card_template.md")
# The Hub's words for how many rows a dataset has.
_SIZES = (
    "n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B",
    "100B<n<1T", "n>1T",
)  # fmt: skip


def render_shards_card(
    manifest: Manifest, repo_id: str | None = None, license: str | None = None, terms: Markdown | None = None
) -> DatasetCard:
    """Render the card of a folder of cached activations.

    Args:
        manifest: of the folder.
        repo_id: where on the Hub it will be; the commands of the card read it from there, else from FOLDER.
        license: of the activations, in the Hub's spelling; only their publisher can grant one.
        terms: of the language model; default: so far as its name says.
    """
    source = hub_id(manifest.dataset, manifest.dataset_revision)
    data = DatasetCardData(
        pretty_name=one_line(f"Activations of {manifest.lm_name}"),
        tags=["activations", "sparse-autoencoder", "hf_selortho"],
        size_categories=[size_category(manifest.counts.rows + manifest.held_out_rows)],
        source_datasets=[source] if source else None,
        license=one_line(license) if license else None,
    )
    plain = manifest.site == "resid_post" and manifest.target is None
    values = {
        "card_data": Markdown(data.to_yaml()),
        "manifest": manifest,
        "width": manifest.layer(manifest.layers[0]).d_in,
        "sites": [Markdown(code(site)) for site in (manifest.site, manifest.target) if site and not plain],
        "place": f"hub:{repo_id}" if repo_id else "FOLDER",
        "published": repo_id is not None,
        "license": license,
        "terms": terms_of(manifest.lm_name) if terms is None else terms,
    }
    return DatasetCard(render(_TEMPLATE.read_text(encoding="utf-8"), values))


def size_category(rows: int) -> str:
    """Return the Hub's word for a number of rows: a step for every power of ten from a thousand on."""
    return _SIZES[min(max(len(str(rows)) - 3, 0), len(_SIZES) - 1)]
