"""How many of the SAEs in SAELens's registry are read exactly, by the layouts of their files; what messages say."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_selortho
from hf_selortho import SelOrthoError
from hf_selortho.commands.evaluate import main as evaluate
from hf_selortho.commands.index import main as index
from hf_selortho.features import FeatureIndex
from tests.formats import published as p
from tests.formats.test_published import edit

LAYOUTS = json.loads(Path(__file__).with_name("layouts.json").read_text(encoding="utf-8"))["layouts"]
TABLE = Path(__file__).parents[2] / "docs/formats.md"


def temporal(root: Path) -> tuple[Path, None]:
    folder = root / "layer_3/temporal"
    folder.mkdir(parents=True)
    save_file({"D": p.draw(p.F, p.D), "b": p.draw(1, p.D)}, folder / "latest_ckpt.safetensors")
    (folder / "conf.yaml").write_text("sae: {scaling_factor: 1.0}\n")
    return folder, None


@torch.no_grad()
def outcome(layout: dict[str, Any]) -> str:
    """Make a folder of a layout in the working directory and tell how it is read."""
    root = Path(f"{layout['family']} {layout['kind']}".replace("/", " "))
    write = temporal if layout["writer"] == "temporal" else getattr(p, layout["writer"])
    folder, formula = write(root, **layout["arguments"])
    if "jbloom" in str(folder):  # what the registry knows is of a repository
        folder = Path(*folder.parts[1:-1])
        folder.parent.mkdir(exist_ok=True)
        (root / folder).rename(folder)
        load = partial(hf_selortho.load, str(folder), subfolder="gemma_2b_blocks.12.hook_resid_post_16384")
    else:
        load = partial(hf_selortho.load, folder)
    x = 2 * torch.randn(100, p.D, generator=torch.Generator().manual_seed(0))
    try:
        sae = load()
    except SelOrthoError:
        try:
            load(approximate=True)
        except SelOrthoError:
            return "refuses"
        return "approximately"
    h, y = formula(x)
    torch.testing.assert_close(sae.encode(x).double(), h, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x).double(), y, atol=2e-5, rtol=1e-5)
    return "exactly"


def test_the_share_of_the_registry_that_is_read_exactly_is_that_of_the_table(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, counts = [], Counter[str]()
    for layout in LAYOUTS:
        how = outcome(layout)
        counts[how] += layout["count"]
        found.append((layout["family"], layout["kind"], f"{layout['count']:,}", how))
    table = TABLE.read_text(encoding="utf-8")
    assert re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([\d,]+) \| (\w+)", table, re.MULTILINE) == found
    exactly, entries = counts["exactly"], sum(counts.values())
    assert entries == 13_857 and exactly >= 0.95 * entries
    assert f"**{exactly:,} of {entries:,} exactly ({exactly / entries:.1%})**, {counts['approximately']}" in table
    assert f"approximately, {counts['refuses']} refused" in table


def tensors(name: str, **changes: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file({**load_file(folder / name), **changes}, folder / name)


_LENS, _WEIGHTS = partial(p.saelens, kind="standard"), "sae_weights.safetensors"
# What the other tests of this folder do not try: writer, what is changed, and what is said; None: it is read.
MESSAGES: dict[str, tuple[Any, Any, str | None]] = {
    "factors of one": (_LENS, tensors(_WEIGHTS, scaling_factor=torch.ones(p.F)), None),
    "other factors": (_LENS, tensors(_WEIGHTS, scaling_factor=torch.full((p.F,), 2.0)), "unexpected: scaling_factor"),
    "heads": (_LENS, edit("cfg.json", reshape_activations="hook_z"), None),
    "normalize false": (_LENS, edit("cfg.json", normalize_activations=False), None),
    "no d_sae": (_LENS, edit("cfg.json", d_sae=None), "d_sae=None, expected a positive"),
    "tanh-relu": (_LENS, edit("cfg.json", activation_fn="tanh-relu"), "activation function tanh-relu"),
    "crosscoder": (_LENS, edit("cfg.json", architecture="crosscoder"), "'crosscoder' of SAELens is not read"),
    "temporal": (temporal, None, "latest_ckpt.safetensors is of a temporal SAE, whose features of a token depend"),
    "cross-layer": (p.cross_layer, None, "is a cross-layer transcoder, which writes to several layers"),
    "groupmax": (p.sparsify, edit("cfg.json", activation="groupmax"), "activation='groupmax' is not read"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_each_case_is_read_or_refused_with_its_name_and_reason(case, tmp_path) -> None:
    write, change, message = MESSAGES[case]
    folder = write(tmp_path)[0]
    if change is not None:
        change(folder)
    if message is None:
        assert hf_selortho.load(folder).config.d_in == p.D
        return
    with pytest.raises(SelOrthoError, match=message) as caught:
        hf_selortho.load(folder)
    assert "\n" not in str(caught.value) and "d_in is missing" not in str(caught.value)


def test_a_transcoder_of_others_is_evaluated_and_indexed(tiny_lm_dir, sample_text_files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(p, "D", 32)
    lm, (file, _) = tiny_lm_dir("llama"), p.circuit_tracer(tmp_path)
    (place := file.with_name("layer_1.safetensors")).write_bytes(file.read_bytes())
    reads = ["--model", str(lm), "--lm_dtype", "float32", "--dataset", str(sample_text_files.csv), "--cpu"]
    reads += ["--held_out_fraction", "0.3"]
    evaluate(
        [str(place), *reads, "--eval_samples", "8", "--eval_ce_samples", "4", "--output", str(tmp_path / "m.json")]
    )
    metrics = json.loads((tmp_path / "m.json").read_text())["evaluation"]
    assert metrics["fvu"] > 0 and metrics["l0"] > 0 and metrics["ce_reconstruction"] > 0
    index([str(place), *reads, "--tokens", "300", "--concepts", "none", "--output", str(tmp_path / "index")])
    found = FeatureIndex.open(tmp_path / "index")
    assert len(found) == p.F and any(found.feature(number).fires for number in range(p.F))
