"""A small SAE with its twin and feature indexes, and the page's parts around them, in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.browser.live import LiveModel
from hf_selortho.browser.shelf import Settings, Shown, open_shelf
from hf_selortho.browser.views import Views
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.features.build import IndexSettings, Sources, build_feature_index
from hf_selortho.features.index_writer import INDEX, IndexWriter
from hf_selortho.language_models.capture import ActivationCapture

HOSTILE = '<img src=x onerror="document.title=1">'
LABELS = {3: HOSTILE, 5: "rivers & bridges", 7: "‮turned round"}
EXAMPLES = ("The old river measured two bridges.", HOSTILE)


def save_small_sae(folder: Path, lm, seed: int, **settings) -> SelOrthoSAE:
    """An SAE of random weights that fires on some of the tokens."""
    config = SelOrthoConfig(
        d_in=32, d_sae=96, layer=1, hook_name="model.layers.1", lm_name=lm.name, lm_revision=lm.revision,
        context_length=32, min_support=2, pair_fraction=0.01, **settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    sae = SelOrthoSAE(config)
    with torch.no_grad():
        sae.b_enc.fill_(-0.6)
        sae.set_input_statistics(torch.zeros(32), 3.0)
    sae.save_pretrained(folder)
    evaluation = {"fvu": 0.25 + seed / 100, "l0": 12.5, "loss_recovered": 0.9, "dead_features": 1}
    (folder / "metrics.json").write_text(json.dumps({"evaluation": evaluation}))
    rows = ({"step": step, "fvu": 1 / step, "l0": 50 - step, "dead_features": 0} for step in (1, 10, 20))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The card\n\n" + HOSTILE + "\n")
    return sae


@pytest.fixture(scope="session")
def small_run(tiny_lm, sample_text_files, tmp_path_factory) -> Path:
    """Folders `layer_1` and `layer_1_twin`, each with an index."""
    folder, lm = tmp_path_factory.mktemp("space") / "run", tiny_lm("gemma3")
    saes = {
        "layer_1": save_small_sae(folder / "layer_1", lm, 0),
        "layer_1_twin": save_small_sae(folder / "layer_1_twin", lm, 1, penalty="none"),
    }
    documents = open_documents(TextSource(str(sample_text_files.csv), text_column="text", held_out_fraction=0.5))
    for name, sae in saes.items():
        twin = saes["layer_1_twin"] if name == "layer_1" else None
        sources = Sources(
            sae.eval(), ActivationCapture(lm, 1), documents, name, "0" * 64, twin, "layer_1_twin", "1" * 64,
            labels=LABELS,
        )  # fmt: skip
        with IndexWriter(folder / name / INDEX) as writer:
            build_feature_index(sources, IndexSettings(tokens=4000), writer, progress=False)
    return folder


@pytest.fixture(scope="session")
def shelf(small_run) -> dict[str, Shown]:
    return open_shelf(str(small_run), None)


@pytest.fixture(scope="session")
def live(small_run, shelf) -> LiveModel:
    model = LiveModel(Settings(str(small_run)), shelf)
    model.start_loading()
    model.wait()
    return model


@pytest.fixture(scope="session")
def views(shelf, live) -> Views:
    return Views(shelf, live, EXAMPLES)


@pytest.fixture(scope="session")
def views_without_lm(small_run, shelf) -> Views:
    return Views(shelf, LiveModel(Settings(str(small_run), lm="none"), shelf), EXAMPLES)
