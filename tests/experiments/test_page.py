"""The pages of the study: every number in their sentences is in the records, their tables are what the records give."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from experiments.analysis import RECIPES, Study, differences, gains
from experiments.page import PAGES, PUBLISHED, fill, tables_of, write_pages
from experiments.sites import RECORDS

ROOT = Path(__file__).parents[2]
NOT_FIGURES = re.compile(
    r"`[^`]*`|\]\([^)]*\)|<!--.*?-->|Gemma-3-270m|Gemma-2-2B|[Tt]op 0\.1%|95%|\b[FL][01]\b|^\| *setting.*$", re.DOTALL
)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?")


@cache
def study() -> Study:
    return Study.read(PUBLISHED)


def record(name: str) -> dict:
    return json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))


def number_of(key: str) -> float:
    """The number that a key in `<!-- numbers: ... -->` names; "%" at its end: a share, in percent."""
    if key.endswith("%"):
        return 100 * number_of(key[:-1])
    kind, *path = key.split("/")
    match kind, path:
        case "said", [text]:  # a setting, or a number of the paper
            return float(text)
        case "value", [sweep, variant, column]:
            return study().sweep(sweep).loc[variant][column].mean()
        case "layer", [layer, column]:
            sweep = study().sweep("paper" if layer == "8" else "layers", int(layer))
            return sweep.loc["selective-0.1"][column].mean()
        case "synthetic", [recipe, variant, column]:
            found = gains(study().synthetic, recipe).xs(variant, level="variant")[column].mean()
        case "seeds", [sweep, variant, column]:
            return study().stability.loc[(sweep, variant), column]
        case "pairs", ["total"]:
            return sum(facts["pairs"] for facts in study().pairs["classes"].values())
        case "pairs", [classes, name, column]:
            return study().pairs[classes][name][column]
        case "sites", [run, *place]:  # "sites/RUN/saes/layer_9/kl"
            found = json.loads(RECORDS.read_text(encoding="utf-8"))[run]
            for name in place:
                found = found["" if name == "-" else name]
            return found
        case "text", [column]:
            return record("harvest")["text"][column]
        case "timing", ["more_pairs"]:
            return record("timing")["memory_of_more_pairs"] - 1
        case "timing", [label, column]:
            return study().timing.loc[label, column] / (1e6 if column == "memory_bytes" else 1)
        case "count", [name]:
            rows = {"saes": study().saes, "synthetic": study().synthetic}
            return len(rows[name]) if name in rows else changes(name).index.unique("variant").size
        case "best", [column]:
            return max(changes(name)[column].groupby(level="variant").mean().max() for name in RECIPES)
        case _, [variant, column]:
            found = changes(kind).loc[variant][column].mean()
        case _:
            raise AssertionError(f"unknown key {key}")
    return 100 * found if path[-1].endswith("_share") else found


@cache
def changes(sweep: str) -> pd.DataFrame:
    if sweep == "steered":
        return differences(pd.concat([study().sweep("topk").loc[["none"]], study().sweep("topk-adaptive")]))
    return differences(study().sweep(sweep))


def blocks(text: str) -> list[str]:
    """Paragraphs, list items and rows of hand-written tables, each with its `<!-- numbers: ... -->`."""
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)
    return [block for block in re.split(r"\n\n+|\n(?=[-|] ?)", text) if block.strip()]


def wrong_numbers(block: str) -> list[str]:
    keys = " ".join(re.findall(r"<!-- numbers: (.*?) -->", block, re.DOTALL)).split()
    shown = NUMBER.findall(NOT_FIGURES.sub(" ", block))
    if len(keys) != len(shown):
        return [f"{len(shown)} numbers ({' '.join(shown)}), {len(keys)} keys: {block[:80]}"]
    wrong = []
    for text, key in zip(shown, keys, strict=True):
        found, told = number_of(key), float(text.replace(",", ""))
        digits = len(text.partition(".")[2])
        expected = found if text[0] in "+-" else abs(found)
        if abs(told - expected) > 0.5 * 10**-digits + 1e-9:
            wrong.append(f"{text} is {found:.5g} in the records: {key}")
    return wrong


@pytest.mark.parametrize("block", blocks((ROOT / "RESULTS.md").read_text(encoding="utf-8")))
def test_every_number_of_a_sentence_is_in_the_records(block) -> None:
    assert not wrong_numbers(block)


def test_readme_tells_numbers_of_the_records() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = [block for block in blocks(text) if "<!-- numbers:" in block]
    assert [wrong for block in told for wrong in wrong_numbers(block)] == []


def test_a_wrong_number_is_found() -> None:
    keys = "topk/activation-0.03/top_correlation_share topk/activation-0.03/fvu_share"
    good = f"It takes 36% and +2.3%. <!-- numbers: {keys} -->"
    assert wrong_numbers(good) == []
    assert "37 is -36.3" in wrong_numbers(good.replace("36", "37"))[0]
    assert "-2.3 is 2.3" in wrong_numbers(good.replace("+2.3", "-2.3"))[0]
    assert "3 numbers" in wrong_numbers(good.replace("It", "4 times it"))[0]


def test_pages_are_filled_from_the_records() -> None:
    tables = tables_of(study())
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert fill(text, tables) == text, f"fill it anew: python -m experiments.page ({page})"
        assert "(not measured)" not in text
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), link


def test_names_of_settings_are_those_of_the_records() -> None:
    """Options of the table of names, against the arguments of the trainings."""
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| .* \| `(--[^`]*)`", text, re.MULTILINE)
    assert len(rows) == 13
    for name, options in rows:
        path = sorted((PUBLISHED / "topk").glob(f"{name}-[0-9]*-layer8-seed0.json"))[0]
        arguments = json.loads(path.read_text(encoding="utf-8"))["arguments"]
        for option, value in re.findall(r"--(\w+) (\S+)", options):
            assert str(arguments[option]) in (value, f"{value}.0"), (name, option)


def test_records_of_a_part_give_pictures_and_tables_beside_them(tmp_path) -> None:
    for path in (PUBLISHED / "topk").glob("*-0.03-layer8-seed0.json"):
        shutil.copy(path, tmp_path)
    shutil.copy(PUBLISHED / "topk" / "none-layer8-seed0.json", tmp_path)
    (page,) = write_pages(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "| `activation-0.03` | +0.0020 | +2.1 |" in text and "(not measured)" in text
    assert (tmp_path / "figures" / "headline.png").stat().st_size > 5000
