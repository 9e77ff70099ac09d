"""Conversions: what is written, what is recorded of where it came from, and what is never lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.commands.convert import main
from hf_selortho.formats import FORMATS, load_sae, write_saelens
from hf_selortho.formats.convert import convert
from hf_selortho.formats.load import READERS
from hf_selortho.utils.command_line import run_script


@pytest.fixture
def own(tmp_path) -> Path:
    SelOrthoSAE(SelOrthoConfig(d_in=8, d_sae=16, layer=3, lm_name="google/gemma-2-2b")).save_pretrained(
        tmp_path / "own"
    )
    return tmp_path / "own"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys, *arguments: object) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: main([*map(str, arguments)]))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1, said
    return said


def test_files_are_named_and_the_source_is_recorded(own, tmp_path, capsys) -> None:
    main([str(own), str(tmp_path / "lens"), "--to", "saelens"])
    said = capsys.readouterr().out
    assert said == (
        f"wrote cfg.json, sae_weights.safetensors to {tmp_path}/lens; load it with: "
        f"sae_lens.SAE.load_from_disk('{tmp_path}/lens')\n"
    )
    written = convert(str(tmp_path / "lens"), tmp_path / "back", "selortho")
    assert sorted(path.name for path in written) == ["config.json", "model.safetensors", "run.json"]
    origin = json.loads((tmp_path / "back/run.json").read_text())["converted_from"]
    assert (origin["format"], origin["name"], origin["revision"]) == ("saelens", str(tmp_path / "lens"), None)
    assert origin["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    with torch.no_grad():
        x = torch.randn(9, 8)
        torch.testing.assert_close(load_sae(tmp_path / "back").encode(x), load_sae(own).encode(x))


def test_the_measured_l0_goes_along(own, tmp_path) -> None:
    (own / "metrics.json").write_text(json.dumps({"evaluation": {"l0": 7.5}}))
    convert(str(own), tmp_path / "lens", "saelens")
    assert json.loads((tmp_path / "lens/cfg.json").read_text())["metadata"]["l0"] == 7.5
    (own / "metrics.json").write_text("{")  # which is no reason not to convert
    convert(str(own), tmp_path / "again", "saelens")
    assert "l0" not in json.loads((tmp_path / "again/cfg.json").read_text())["metadata"]


def test_a_conversion_is_replaced_on_request_and_nothing_else(own, tmp_path, capsys) -> None:
    target = tmp_path / "there"
    main([str(own), str(target), "--to", "saelens"])
    before = contents(target)
    assert "is not empty" in refusal(capsys, own, target, "--to", "selortho")
    assert contents(target) == before
    main([str(own), str(target), "--to", "selortho", "--overwrite"])
    assert sorted(contents(target)) == ["config.json", "model.safetensors", "run.json"]
    (target / "metrics.jsonl").touch()  # a run
    before = contents(target)
    assert "holds metrics.jsonl, which no conversion wrote" in refusal(
        capsys, own, target, "--to", "saelens", "--overwrite"
    )
    assert contents(target) == before
    assert "is the SAE to convert" in refusal(capsys, own, own, "--to", "saelens", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "there"]


def test_what_is_there_survives_a_full_disk(own, tmp_path, monkeypatch) -> None:
    target = tmp_path / "there"
    convert(str(own), target, "saelens")
    before = contents(target)
    for to, place in (("saelens", "saelens.save_file"), ("selortho", "convert.write_json")):
        with monkeypatch.context() as patch:
            patch.setattr(f"hf_selortho.formats.{place}", _full)
            with pytest.raises(SelOrthoError, match="the disk is full"):
                convert(str(own), target, to, overwrite=True)
        assert contents(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "there"]


def _full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_targets_that_cannot_be_written(own, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "file").touch()
    assert "is no folder" in refusal(capsys, own, tmp_path / "file", "--to", "saelens")
    assert "cannot write" in refusal(capsys, own, tmp_path / "file/below", "--to", "selortho")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "is the working directory" in refusal(capsys, own, ".", "--to", "saelens")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is no folder" in refusal(capsys, own, tmp_path / "link", "--to", "saelens")
    convert(str(own), Path("below"), "saelens")
    assert load_sae("below").config.layer == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "saelens", "--token", "x"), "unrecognized arguments: --token"),
        (("--to", "sparsify"), "invalid choice: 'sparsify'"),
        ((), "the following arguments are required: --to"),
        (("--to", "selortho", "--from", "saelens"), "holds no SAE in the format saelens"),
        (
            ("--to", "selortho", "--subfolder", "layer_9"),
            "it holds nothing; expected config.json, or the files of SAELens, .* with a subfolder",
        ),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(arguments, message, own, tmp_path, capsys) -> None:
    assert re.search(message, refusal(capsys, own, tmp_path / "new", *arguments))
    assert list(tmp_path.iterdir()) == [own]


def test_what_is_not_finite_is_not_converted(own, tmp_path, capsys) -> None:
    sae = load_sae(own)
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.nan
    sae.save_pretrained(own)
    assert "W_enc of this SAE holds NaN or infinity" in refusal(capsys, own, tmp_path / "lens", "--to", "saelens")
    assert list(tmp_path.iterdir()) == [own]


def test_a_subfolder(own, tmp_path) -> None:
    write_saelens(load_sae(own), tmp_path / "repo/blocks.3/lens")
    convert(str(tmp_path / "repo"), tmp_path / "new", "selortho", subfolder="blocks.3/lens")
    assert json.loads((tmp_path / "new/run.json").read_text())["converted_from"]["subfolder"] == "blocks.3/lens"


def test_unknown_formats_and_arguments(own) -> None:
    with pytest.raises(SelOrthoError, match="format 'pickle': expected auto or one of selortho, saelens"):
        load_sae(own, "pickle")
    with pytest.raises(
        SelOrthoError, match="it holds notes.txt; expected config.json, or the files of SAELens, sparsify"
    ):
        (own / "sub").mkdir()
        (own / "sub/notes.txt").touch()
        load_sae(own / "sub")
    with pytest.raises(SelOrthoError, match="dtype says nothing"):
        load_sae(own, dtype="float32")


def test_the_formats_that_the_command_offers_are_those_that_are_read() -> None:
    assert FORMATS == ("selortho", *READERS)
