"""Folders of runs, read back for publishing: what belongs together, and what only looks like it."""

from __future__ import annotations

import pytest

from hf_selortho import ConfigError, SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.hub.run_folder import read_run, with_others
from tests.finished_run import save_run


def fvus(run) -> list:
    (sae,) = run.saes
    twin = sae.twin
    return [
        sae.metrics["evaluation"]["fvu"],
        twin and twin["evaluation"]["fvu"],
        [m["evaluation"]["fvu"] for m in sae.seeds],
        [m["evaluation"]["fvu"] for m in sae.twin_seeds],
    ]


def test_a_run_of_one_sae(tmp_path) -> None:
    run = read_run(save_run(tmp_path / "x"))
    (sae,) = run.saes
    assert (sae.name, sae.layer, sae.metrics["evaluation"]["fvu"]) == ("", 2, 0.1)
    assert sae.pictures == ["pictures/b.png", "pictures/a.png"]  # first what the training has drawn
    assert run.seed == 0
    assert fvus(with_others(run, None, [])) == [0.1, None, [], []]


def test_a_checkpoint_is_a_run_without_metrics(tmp_path) -> None:
    SelOrthoSAE(SelOrthoConfig(d_in=8, d_sae=16)).save_pretrained(tmp_path)
    (sae,) = read_run(tmp_path).saes
    assert sae.metrics == {} and sae.pictures == []


def test_a_run_of_several_saes_in_the_order_of_their_layers(tmp_path) -> None:
    for layer in (12, 5):
        save_run(tmp_path / f"layer_{layer}", layer=layer, fvu=layer / 100)
        save_run(tmp_path / f"layer_{layer}_twin", layer=layer, fvu=layer / 200, ortho_coefficient=0.0)
    saes = {sae.name: sae for sae in read_run(tmp_path).saes}
    assert list(saes) == ["layer_5", "layer_5_twin", "layer_12", "layer_12_twin"]
    assert saes["layer_12"].twin == saes["layer_12_twin"].metrics
    assert saes["layer_12_twin"].twin is None and saes["layer_12_twin"].variant == "twin"
    assert saes["layer_5"].pictures[0] == "layer_5/pictures/b.png"
    with pytest.raises(SelOrthoError, match="has several SAEs"):
        with_others(read_run(tmp_path), tmp_path / "layer_5", [])


def test_the_twin_beside_the_folder_is_found_and_an_impostor_is_not(tmp_path) -> None:
    run = read_run(save_run(tmp_path / "x"))
    twin = save_run(tmp_path / "x-twin", fvu=0.09, ortho_coefficient=0.0, min_support=2)
    assert fvus(with_others(run, None, [])) == [0.1, 0.09, [], []]
    assert fvus(with_others(run, twin, [])) == [0.1, 0.09, [], []]
    other = save_run(tmp_path / "y", d_sae=32, ortho_coefficient=0.0)
    with pytest.raises(SelOrthoError, match="without the penalty: d_sae is 32 and not 16"):
        with_others(run, other, [])
    with pytest.raises(SelOrthoError, match=r"its ortho_coefficient is 0\.03"):
        with_others(run, save_run(tmp_path / "z"), [])
    other.rename(tmp_path / "z-twin")
    assert fvus(with_others(read_run(tmp_path / "z"), None, [])) == [0.1, None, [], []]


def test_seeds_and_their_twins(tmp_path) -> None:
    folders = [save_run(tmp_path / f"s{seed}", seed, fvu=0.1 + seed, max_norm=9.0 + seed) for seed in range(3)]
    run = read_run(folders[0])
    assert fvus(with_others(run, None, folders[1:])) == [0.1, None, [1.1, 2.1], []]
    for seed in (0, 1):
        save_run(tmp_path / f"s{seed}-twin", seed, fvu=0.05 + seed, penalty="none")
    assert fvus(with_others(run, None, folders[1:])) == [0.1, 0.05, [1.1, 2.1], []]  # not of every seed
    save_run(tmp_path / "s2-twin", 2, fvu=2.05, penalty="none")
    assert fvus(with_others(run, None, folders[1:])) == [0.1, 0.05, [1.1, 2.1], [1.05, 2.05]]


@pytest.mark.parametrize(
    ("seed", "settings", "message"),
    [
        (0, {}, "have the same seed, 0"),
        (1, {"l1_coefficient": 0.1}, "is not .* with another seed: l1_coefficient is 0.1 and not 0.04"),
    ],
)
def test_what_is_no_other_seed_is_refused(seed, settings, message, tmp_path) -> None:
    run = read_run(save_run(tmp_path / "x"))
    with pytest.raises(SelOrthoError, match=message):
        with_others(run, None, [save_run(tmp_path / "y", seed, **settings)])


def test_a_run_of_other_layers_is_no_other_seed(tmp_path) -> None:
    save_run(tmp_path / "x/layer_2")
    save_run(tmp_path / "y/layer_3", seed=1, layer=3)
    with pytest.raises(SelOrthoError, match="has no SAE layer_2"):
        with_others(read_run(tmp_path / "x"), None, [tmp_path / "y"])


def test_what_is_no_run_is_refused(tmp_path) -> None:
    with pytest.raises(SelOrthoError, match="is no folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(SelOrthoError, match="holds no config.json"):
        read_run(tmp_path)
    save_run(tmp_path / "x/deep/sae")
    with pytest.raises(SelOrthoError, match="holds no config.json; expected the folder of a run"):
        read_run(tmp_path / "x")
    (tmp_path / "x/deep/sae/metrics.json").write_text("[1]")
    with pytest.raises(ConfigError, match="holds no JSON object"):
        read_run(tmp_path / "x/deep/sae")


def test_links_that_lead_out_of_the_run_are_refused(tmp_path) -> None:
    folder = save_run(tmp_path / "x")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "pictures/c.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(SelOrthoError, match="leads out of"):
        read_run(folder)
