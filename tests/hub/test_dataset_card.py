"""Cards of datasets: of activations as the manifest describes them, of feature examples; complete, partial, hostile."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard

from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.cache_manifest import Manifest, from_json
from hf_selortho.hub.dataset_card import render_shards_card, size_category
from tests.data.caches import content, summary
from tests.loopback_hub import LoopbackHub

HOSTILE = "a: b\n---\n<img src=x onerror=alert(1)> | `x` ```\n# H [l](javascript:alert(1)) {{ 7 * 7 }} {% raw %}"
MANIFEST = from_json(Manifest, {**content(), "layers": [5, 12], "statistics": {"5": summary(5), "12": summary(12)},
    "shards": [{"number": 0, "rows": 9, "files": {
        f"{folder}/00000.safetensors": {"sha256": "0" * 64, "bytes": 99} for folder in ("tokens", "layer_5", "layer_12")
    }}]})  # fmt: skip


def hostile_manifest() -> Manifest:
    return replace(
        MANIFEST,
        **{name: HOSTILE for name in ("lm_name", "lm_revision", "lm_dtype", "dataset", "dataset_revision", "split")},
    )


CARDS = {
    "shards": lambda: render_shards_card(MANIFEST, "org/acts", "cc-by-4.0"),
    "shards in a folder": lambda: render_shards_card(MANIFEST),
    "shards of local text": lambda: render_shards_card(
        replace(MANIFEST, dataset="/data/x.csv", dataset_revision=None, max_norm_ratio=None)
    ),
    "hostile shards": lambda: render_shards_card(hostile_manifest(), HOSTILE, HOSTILE),
}


def without_code(markdown: str) -> str:
    markdown = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "CODE", markdown)


@pytest.mark.parametrize("name", CARDS)
def test_every_card_is_well_formed(name) -> None:
    card = CARDS[name]()
    text = str(card)
    assert text == str(DatasetCard(text)) and "\n\n\n" not in text and text.endswith("\n")
    assert not re.search(r"\b(None|nan|Undefined)\b", text)
    prose = without_code(card.text)
    lines = [line for line in prose.split("\n") if line]
    for line, following in zip(lines, [*lines[1:], "# end"], strict=True):
        assert not (line.startswith("#") and following.startswith("#")), f"empty section: {line}"
    for table in re.findall(r"(?:^\|.*\|\n)+", prose, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table
    for trace in ("<img", "javascript:", "onerror", "7 * 7", "[l]"):
        assert trace not in prose
    data = yaml.safe_load(text.split("---\n")[1])
    assert "hf_selortho" in data["tags"] and re.fullmatch(r"n<1K|\d+[KMBT]?<n<\d+[KMBT]", data["size_categories"][0])


def test_what_the_card_of_shards_says() -> None:
    card = CARDS["shards"]()
    assert card.data.source_datasets == ["fancyzhx/ag_news"] and card.data.license == "cc-by-4.0"
    assert card.data.size_categories == ["1K<n<10K"]
    for part in (
        "| Tokens for training | 1,990 of 30 contexts |",
        "| Width | 4 |",
        "hub:org/acts --layers 5 12",
    ):
        assert part in card.text
    assert "norm above 4 times the median" in card.text and "Gemma Terms of Use" in card.text
    heads = render_shards_card(replace(MANIFEST, site="attn_z")).text
    assert "| Layers | 5, 12, at `attn_z` of each, counted from 0 |" in heads
    local = CARDS["shards of local text"]()
    assert (
        local.data.source_datasets is None and "times the median" not in local.text and "has not stated" in local.text
    )


@pytest.mark.parametrize(
    ("rows", "word"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**9, "1B<n<10B"), (10**12, "n>1T")]
)
def test_size_categories(rows, word) -> None:
    assert size_category(rows) == word


@pytest.mark.slow
def test_a_cache_has_a_card_and_its_folder_is_a_repository(tiny_lm_dir, sample_text_files, tmp_path) -> None:
    folder = tmp_path / "acts"
    settings = {
        "model": tiny_lm_dir("llama"), "dataset": sample_text_files.csv, "context_length": 32, "max_tokens": 2000,
        "eval_samples": 5, "output_dir": folder,
    }  # fmt: skip
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "scripts/cache_activations.py", *arguments, "--layers", "1", "--cpu"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    card = (folder / "README.md").read_text()
    cache = ActivationCache(str(folder))
    assert f"| Tokens for training | {cache.manifest.rows:,} of " in card
    snippet = re.search(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)[1]
    with LoopbackHub() as hub:
        hub.upload("acme/acts", folder, kind="dataset")  # with a .gitattributes, as the Hub adds it
        published = str(render_shards_card(cache.manifest, "acme/acts"))
        snippet = re.search(r"^```python\n(.*?)^```$", published, flags=re.MULTILINE | re.DOTALL)[1]
        ran = hub.run(snippet, tmp_path / "home")
        assert ran.stdout == f"{cache.manifest.rows} (1,)\n", ran.stderr[-2000:]
