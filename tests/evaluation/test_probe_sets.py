"""Probes on the sets of sae-probes: against the package itself, plain scikit-learn and one forward pass a text."""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import LeavePOut, StratifiedKFold

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.data import sae_probes
from hf_selortho.data.sae_probes import TRAINED_ON, ProbeSet, probe_set_names, read_probe_set
from hf_selortho.evaluation import last_tokens, probe_scores
from hf_selortho.evaluation.metrics import Interval
from hf_selortho.evaluation.probe_scores import (
    check_probes,
    check_widths,
    dense_auc,
    measure_probes,
    probe_auc,
    ranked,
    sparse_aucs,
)
from hf_selortho.evaluation.probe_sets import (
    FULL,
    QUICK_SETS,
    Cap,
    benchmark_split,
    last_token_activations,
    probe_texts,
    single_feature_aucs,
    split_rows,
)
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.language_models.loading import load_language_model
from scripts import evaluate_sae

CAP = Cap(64, 12)
SETS = ("125_world_country_Italy", "54_cs_tf")  # one of them trained on


@pytest.fixture(scope="module")
def package() -> SimpleNamespace:
    """Functions of the package sae-probes, which cannot be imported without its dependencies."""
    found = importlib.util.find_spec("sae_probes")
    assert found and found.submodule_search_locations
    names: dict[str, Any] = {
        "np": np, "torch": torch, "dataclass": dataclass, "NamedTuple": NamedTuple, "roc_auc_score": roc_auc_score,
        "accuracy_score": accuracy_score, "f1_score": f1_score, "LogisticRegression": LogisticRegression,
        "StratifiedKFold": StratifiedKFold, "LeavePOut": LeavePOut, "__name__": __name__,
    }  # fmt: skip
    wanted = {
        "utils_training": {"Metrics", "BestClassifierResults", "get_cv", "get_splits", "find_best_reg"},
        "run_sae_evals": {"mean_act_normalization", "get_sorted_indices"},
        "utils_data": {"get_train_test_indices"},
    }
    for file, functions in wanted.items():
        tree = ast.parse((Path(found.submodule_search_locations[0]) / f"{file}.py").read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if getattr(node, "name", None) in functions]
        assert len(tree.body) == len(functions)
        exec(compile(tree, file, "exec"), names)
    return SimpleNamespace(**names)


def sae_of(d_in: int, d_sae: int, **settings: Any) -> SelOrthoSAE:
    return SelOrthoSAE(SelOrthoConfig(d_in=d_in, d_sae=d_sae, **settings)).eval()


def planted(rows: int, d_in: int = 24) -> tuple[torch.Tensor, np.ndarray]:
    """Activations of which three directions tell a little of the class."""
    labels = np.arange(rows) % 2
    x = torch.randn(rows, d_in)
    x[:, :3] += 0.6 * torch.from_numpy(labels)[:, None]
    return x, labels


def test_scores_are_those_of_the_package_on_equal_activations(package: SimpleNamespace) -> None:
    sae = sae_of(24, 96)
    x, labels = planted(700)
    split = benchmark_split(labels)
    theirs = package.get_train_test_indices(labels, 600, 99)
    assert all(np.array_equal(a, b) for a, b in zip(split, theirs, strict=True))
    h = sae.encode(x).detach()
    train, test = (torch.tensor(rows) for rows in split)
    order = package.get_sorted_indices(h[train], torch.tensor(labels[train]), package.mean_act_normalization)
    assert ranked(h[train], labels[train])[:16].tolist() == order[:16].tolist()
    found = sparse_aucs(sae, x, labels, split) | {"dense": dense_auc(x, labels, split)}
    for k, columns in {**{str(k): h[:, order[:k]] for k in (1, 2, 5, 16)}, "dense": x}.items():
        data = (columns[train].double().numpy(), labels[train], columns[test].double().numpy(), labels[test])
        assert found[k] == pytest.approx(package.find_best_reg(*data, seed=42).metrics.test_auc, abs=1e-9)
    assert found["1"] != found["16"] and found["dense"] > 0.7


@pytest.mark.parametrize(
    ("name", "train", "test", "leak"),
    [
        ("5_hist_fig_ismale", [3182, 3527, 925, 2841, 4416], [584, 299, 329, 1797, 12], 7),
        ("95_toxic_is", [158, 686, 183, 492, 496], [514, 247, 634, 237, 341], 35),
        ("130_temp_cat_Frequency", [869, 211, 796, 654, 192], [886, 97, 397, 607, 92], 92),
    ],
)
def test_the_split_of_a_set_and_its_leak_are_those_of_the_package(name, train, test, leak) -> None:
    probes = read_probe_set(name)
    split = benchmark_split(probes.labels)
    assert split.train[:5].tolist() == train and split.test[:5].tolist() == test
    assert round(100 * probe_texts(probes, FULL).leak) == leak


def test_merged_rows_have_each_text_once_balanced_and_none_of_two_labels() -> None:
    texts = ["a", "b", "a", "c", "d", "e", "c", "f", "g", *map(str, range(200))]
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1, 1, *(n % 2 for n in range(200))])  # "c" has both
    probes = ProbeSet("x", texts, labels, ("no", "yes"))
    full, capped = probe_texts(probes, FULL), probe_texts(probes, Cap(20, 5))
    assert [full.texts[n] for n in full.rows] == texts and sorted(full.texts) == sorted(set(texts))
    for found, size in ((full, 204), (capped, 20)):
        merged = found.texts[: len(found.labels)]
        assert len(merged) == len(set(merged)) == size and found.labels.sum() * 2 == size and "c" not in merged
        assert all(labels[texts.index(text)] == label for text, label in zip(merged, found.labels, strict=True))
    assert len(capped.texts) == 20 and capped.rows is None
    split = split_rows(full.labels)
    assert not set(split.train) & set(split.test) and len(split.train) == 102 and len(split.test) == 101


def test_a_single_feature_has_the_auc_of_its_ranks_in_the_direction_of_the_train_rows() -> None:
    sae = sae_of(16, 40)
    x, labels = planted(301, 16)
    x = x.round()  # many ties
    with torch.no_grad():
        sae.b_enc[:4] = -100  # features that never fire
    split = split_rows(labels)
    found, h = single_feature_aucs(sae, x, labels, split), sae.encode(x).detach().numpy()
    for feature in range(40):
        train, test = (roc_auc_score(labels[rows], h[rows, feature]) for rows in split)
        assert found.negated[feature] == (train < 0.5)
        assert found.train[feature].item() == pytest.approx(max(train, 1 - train), abs=1e-12)
        assert found.test[feature].item() == pytest.approx(1 - test if train < 0.5 else test, abs=1e-12)
    assert found.test[:4].tolist() == [0.5] * 4


def test_last_tokens_are_those_of_a_forward_pass_of_each_text_alone(tiny_lm) -> None:
    lm = tiny_lm("llama")
    capture = ActivationCapture(lm, 1, max_norm=0.1)  # which plays no role
    found = last_token_activations(capture, SETS, prepend_bos=True, progress=False, cap=CAP)
    assert list(found) == list(SETS)
    longer = 0
    for name, (activations, labels) in found.items():
        texts = probe_texts(read_probe_set(name), CAP)
        assert activations.dtype == torch.float32 and labels.tolist() == texts.labels.tolist() and len(labels) == 64
        for text, row in zip(texts.texts[:6], activations, strict=False):
            ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            longer += len(ids) > 11
            ids = torch.tensor([[lm.tokenizer.bos_token_id, *ids[-11:]]])
            alone = lm.model(ids, output_hidden_states=True).hidden_states[2][0, -1]
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)
    assert longer


def test_each_text_is_read_once_and_what_was_read_is_kept_but_for_a_damaged_file(
    tiny_lm, tmp_path, monkeypatch, caplog
) -> None:
    capture, read = ActivationCapture(tiny_lm("llama"), [0, 1]), []
    hidden_states = ActivationCapture.hidden_states
    monkeypatch.setattr(
        ActivationCapture,
        "hidden_states",
        lambda self, ids, mask: (read.extend(ids), hidden_states(self, ids, mask))[1],
    )
    sets = {"one": ["a", "b c", "d"], "two": ["d", "e", ""]}

    def activations() -> dict[str, Any]:
        read.clear()
        return dict(
            last_tokens.read_last_tokens(capture, sets, 8, prepend_bos=True, cache=tmp_path / "kept", progress=False)
        )

    whole = activations()
    assert len(read) == 5 and torch.equal(whole["one"][1][2], whole["two"][1][0])
    first, second, *_ = files = sorted((tmp_path / "kept").glob("*"))
    assert len(files) == 4
    first.write_bytes(first.read_bytes()[:-20])
    second.write_bytes(second.read_bytes()[:-4] + b"abcd")
    again = activations()
    assert len(read) == 3 and caplog.text.count("is damaged") == 2
    assert all(torch.equal(whole[name][layer], again[name][layer]) for name in sets for layer in (0, 1))
    assert activations().keys() == whole.keys() and not read


def test_an_interrupted_reading_goes_on_with_the_set_that_it_was_in(tiny_lm, tmp_path) -> None:
    capture = ActivationCapture(tiny_lm("llama"), 1)
    sets = {"one": ["a"], "two": ["b"]}
    for name, _ in last_tokens.read_last_tokens(capture, sets, 8, prepend_bos=True, cache=tmp_path, progress=False):
        assert name == "one"
        break
    assert [file.name[:4] for file in tmp_path.iterdir()] == ["one-"]


def test_quick_sets_are_a_dozen_half_of_them_never_trained_on() -> None:
    assert len(set(QUICK_SETS)) == 12 and set(QUICK_SETS) <= set(probe_set_names())
    assert len(TRAINED_ON.intersection(QUICK_SETS)) == 6


def test_means_have_intervals_by_student_t() -> None:
    assert Interval.of([0.5, 0.7, 0.9]) == pytest.approx((0.7, 0.7 - 0.496827, 0.7 + 0.496827), abs=1e-5)
    assert Interval.of([0.5]) == (0.5, None, None) and Interval.of([]) == (None, None, None)


@pytest.fixture
def small_sets(monkeypatch, tmp_path) -> None:
    """Two sets, a little of each; and a cache of the test's own."""
    monkeypatch.setattr(probe_scores, "QUICK_SETS", SETS)
    monkeypatch.setattr(probe_scores, "QUICK", CAP)
    monkeypatch.setattr(probe_scores, "FULL", Cap(None, 12))
    monkeypatch.setattr(probe_scores, "probe_set_names", lambda: ("130_temp_cat_Frequency",))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))


def test_figures_are_those_of_the_contract_and_of_each_sae_alone(small_sets, tiny_lm) -> None:
    capture = ActivationCapture(tiny_lm("llama"), [0, 1])
    saes = [sae_of(32, 48, layer=0), sae_of(32, 48, layer=1)]
    found = measure_probes(saes, capture, "quick", prepend_bos=True, progress=False)
    for sae, probes in zip(saes, found, strict=True):
        assert (probes["sets"], probes["texts"], probes["tokens"]) == ("quick", 64, 12)
        activations = last_token_activations(
            capture.at(sae.config.layer), SETS, prepend_bos=True, progress=False, cap=CAP
        )
        for row in probes["per_set"]:
            x, labels = activations[row["name"]]
            split = split_rows(labels)
            assert row["auc"] == sparse_aucs(sae, x, labels, split) and row["dense"] == dense_auc(x, labels, split)
        for group, row in zip(("clean", "trained_on"), probes["per_set"], strict=True):
            assert row["trained_on"] == (group == "trained_on")
            assert probes["k"]["5"][group] == {"mean": row["auc"]["5"], "low": None, "high": None, "sets": 1}
            assert probes["dense"][group]["mean"] == row["dense"]
        assert "benchmark" not in probes
    assert found[0]["dense"] != found[1]["dense"]


def test_with_all_sets_the_rows_of_the_benchmark_stand_beside(small_sets, tiny_lm) -> None:
    capture, sae = ActivationCapture(tiny_lm("llama"), 1), sae_of(32, 48)
    (found,) = measure_probes([sae], capture, "all", prepend_bos=True, progress=False)
    (row,) = found["per_set"]
    assert found["texts"] is None and found["benchmark"]["sets"] == 1
    assert found["benchmark"]["k"]["16"] == row["benchmark"]["auc"]["16"] != row["auc"]["16"]
    probes = read_probe_set("130_temp_cat_Frequency")
    read = last_tokens.read_last_tokens(
        capture, {"x": list(dict.fromkeys(probes.texts))}, 12, prepend_bos=True, cache=None
    )
    distinct = next(read)[1][1]
    numbers = {text: n for n, text in enumerate(dict.fromkeys(probes.texts))}
    x = distinct[[numbers[text] for text in probes.texts]]
    train, test = benchmark_split(probes.labels)
    auc = probe_auc(x[train], probes.labels[train], x[test], probes.labels[test])
    assert row["benchmark"]["dense"] == pytest.approx(auc, abs=1e-3)


def test_what_cannot_be_probed_is_refused_with_the_remedy(monkeypatch) -> None:
    with pytest.raises(SelOrthoError, match="d_sae=15: expected at least 16 features.*--probes"):
        check_widths("quick", None, 64, 15)
    check_widths("none", 15)
    monkeypatch.setattr(sae_probes, "_TABLES", "sae_probes/data/gone")
    with pytest.raises(SelOrthoError, match="missing or damaged: run `pip install --no-deps sae-probes=="):
        check_probes("quick")


def test_evaluate_probes_an_sae_and_shows_it(small_sets, tiny_lm_dir, sample_text_files, tmp_path, capsys) -> None:
    sae, lm = tmp_path / "sae", str(tiny_lm_dir("llama"))
    revision = load_language_model(lm).revision
    sae_of(32, 48, layer=1, lm_name=lm, lm_revision=revision, context_length=32).save_pretrained(sae)
    reads = ["--model", lm, "--dataset", str(sample_text_files.txt), "--eval_samples", "20", "--eval_ce_samples", "0"]
    output = tmp_path / "x.json"
    evaluate_sae.main([str(sae), *reads, "--cpu", "--held_out_fraction", "0.5", "--probes", "--output", str(output)])
    assert json.loads(output.read_text())["evaluation"]["probes"]["k"].keys() == {"1", "2", "5", "16"}
    shown = capsys.readouterr().out
    assert "1 sets not trained on" in shown and "16 features" in shown and "dense" in shown
