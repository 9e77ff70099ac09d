"""Cards as their readers and the Hub see them: complete, partial, hostile; and the snippet runs."""

from __future__ import annotations

import re
from statistics import mean, stdev

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation.probe_scores import summary as probe_summary
from hf_selortho.evaluation.probe_sets import FULL, QUICK, Cap
from hf_selortho.hub.card_results import SaeReport, beside_twins, summary_rows
from hf_selortho.hub.model_card import SaeCard, render_model_card
from hf_selortho.language_models.loading import load_language_model

HOSTILE = "a: b\n---\n<img src=x onerror=alert(1)> | `x` ```\n# H [l](javascript:alert(1)) {{ 7 * 7 }} {% raw %}"
SETTINGS = {
    "d_in": 640,
    "d_sae": 1280,
    "lm_name": "google/gemma-2-2b",
    "lm_revision": "c" * 40,
    "layer": 12,
    "hook_name": "model.layers.12",
    "dataset": "fancyzhx/ag_news",
    "dataset_revision": "d" * 40,
    "dataset_split": "train",
}
EVALUATION = {
    "samples": 1000, "tokens": 52821, "mse": 244799.3, "fvu": 0.10299, "explained_variance": 0.89701, "l0": 115.2,
    "l1": 3.1324, "active_features": 1279, "active_fraction": 0.99921875, "dead_features": 1, "dead_fraction": 0.00078,
    "peak_correlation": 0.8593, "mean_correlation": 0.0837, "top_correlation": 0.2813, "selected_pairs": 819,
    "unique_features": 410.1, "max_decoder_cosine": 0.1974, "ce_samples": 64, "ce_tokens": 3504, "ce_clean": 3.704,
    "ce_reconstruction": 5.437, "ce_zero_ablation": 14.652, "loss_recovered": 0.8417, "kl": 1.62,
    "top1_agreement": 0.4142,
}  # fmt: skip
METRICS = {
    "schema_version": 1,
    "evaluation": EVALUATION,
    "training": {"fvu": 0.0931, "l0": 117.3, "pair_churn": 0.312, "steps": 1500, "tokens": 6_144_000},
    "data": {"contexts": 8000, "tokens_kept": 623_443, "dropped_special": 8000, "dropped_sinks": 12},
}
RUN = {
    "command": "accelerate launch scripts/train.py --preset gemma2-2b-l12",
    "arguments": {"output_dir": "runs/x", "learning_rate": 3e-4, "batch_size": 4096, "seed": 0},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": "two cores",
    "wall_seconds": 431.2,
    "pictures": ["pictures/training_curves.png", "pictures/correlations.png"],
}
TWIN = {
    "evaluation": {**EVALUATION, "top_correlation": 0.4402, "fvu": 0.1012, "dead_features": 0, "dead_fraction": 0.0}
}


def settings(**changes) -> dict:
    return SelOrthoConfig(**{**SETTINGS, **changes}).own_settings()


def without_code(markdown: str) -> str:
    """What a renderer takes as Markdown: fenced blocks and code spans are gone."""
    markdown = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "CODE", markdown)


def assert_well_formed(card: ModelCard) -> None:
    text = str(card)
    assert text == str(ModelCard(text))  # the Hub's own reading of it changes nothing
    assert "\n\n\n" not in text and text.endswith("\n") and not text.endswith("\n\n")
    assert not re.search(r"\b(None|nan|Undefined)\b", text)
    prose = without_code(card.text)
    lines = [line for line in prose.split("\n") if line]
    for line, following in zip(lines, [*lines[1:], "# end"], strict=True):
        depths = [len(text) - len(text.lstrip("#")) for text in (line, following)]
        assert not (0 < depths[1] <= depths[0]), f"empty section: {line}"
        assert not line.endswith(" ")
    tables = re.findall(r"(?:^\|.*\|\n)+", prose, flags=re.MULTILINE)
    for table in tables:
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(cells) == 1 and len(table.splitlines()) > 2, table


CARDS = {
    "full": lambda: render_model_card(
        settings(), METRICS, RUN, repo_id="org/gemma2b-l12", twin=TWIN, license="apache-2.0"
    ),
    "no twin": lambda: render_model_card(settings(), METRICS, RUN, repo_id="org/gemma2b-l12"),
    "no cross-entropy": lambda: render_model_card(
        settings(),
        {**METRICS, "evaluation": {k: v for k, v in EVALUATION.items() if k[:2] != "ce" and k[:4] != "loss"}},
        RUN,
    ),
    "no pictures": lambda: render_model_card(settings(), METRICS, {**RUN, "pictures": []}),
    "no evaluation": lambda: render_model_card(settings(), {**METRICS, "evaluation": {}}, RUN),
    "no run": lambda: render_model_card(settings(), METRICS, {}),
    "no penalty": lambda: render_model_card(settings(penalty="none"), METRICS, RUN),
    "full penalty": lambda: render_model_card(settings(penalty="full"), METRICS, RUN, twin=TWIN),
    "topk": lambda: render_model_card(settings(activation="topk", k=32), METRICS, RUN),
    "nothing known": lambda: render_model_card({"d_in": 640, "d_sae": 1280}, {}, {}),
    "hostile": lambda: hostile_card(),
    "three seeds with twin": lambda: render_model_card(
        settings(),
        METRICS,
        RUN,
        repo_id="org/gemma2b-l12",
        twin=TWIN,
        seeds=[evaluated(fvu=0.1041), evaluated(fvu=0.1021, dead_features=4)],
        twin_seeds=[evaluated(TWIN, fvu=0.1002), evaluated(TWIN, fvu=0.1022)],
    ),
    "three seeds": lambda: render_model_card(settings(), METRICS, RUN, seeds=[evaluated(fvu=0.1041), evaluated()]),
    "probes": lambda: render_model_card(settings(), probed(METRICS, 0.7), RUN),
    "probes beside a twin": lambda: render_model_card(settings(), probed(METRICS, 0.7), RUN, twin=probed(TWIN, 0.6)),
    "probes of the benchmark": lambda: render_model_card(settings(), probed(METRICS, 0.7, cap=FULL), RUN),
    "three layers": lambda: card_of_layers(5, 12, 19),
    "three layers, no metrics": lambda: SaeCard(
        [SaeReport(f"layer_{layer}", settings(layer=layer), {}) for layer in (5, 12, 19)]
    ).render(),
}


def probed(metrics: dict, auc: float, cap: Cap = QUICK) -> dict:
    """Metrics with probes on three clean sets, whose mean is `auc`, and one that is trained on."""
    rows = [
        {"name": f"{n}_x", "trained_on": n == 3, "leak": 0.1, "auc": dict.fromkeys(("1", "2", "5", "16"), auc + d)}
        for n, d in enumerate((-0.1, 0.0, 0.1, 0.2))
    ]
    rows = [{**row, "dense": 0.95} | ({} if cap.texts else {"benchmark": {**row, "dense": 0.95}}) for row in rows]
    return evaluated(metrics, probes={"sets": "quick", **cap._asdict(), **probe_summary(rows), "per_set": rows})


def evaluated(metrics: dict = METRICS, **changes) -> dict:
    return {**metrics, "evaluation": {**metrics["evaluation"], **changes}}


def card_of_layers(*layers: int) -> ModelCard:
    saes = []
    for layer in layers:
        config = settings(layer=layer, hook_name=f"model.layers.{layer}")
        pictures = [f"layer_{layer}/pictures/training_curves.png"]
        saes.append(SaeReport(f"layer_{layer}", config, evaluated(fvu=layer / 100), pictures))
        saes.append(SaeReport(f"layer_{layer}_twin", {**config, "ortho_coefficient": 0.0}, TWIN))
    return SaeCard(beside_twins(saes), RUN, "org/gemma2b", saelens=True).render()


def hostile_card() -> ModelCard:
    names = ("lm_name", "lm_revision", "hook_name", "dataset", "dataset_revision", "dataset_split")
    run = {
        "command": HOSTILE,
        "arguments": {"output_dir": HOSTILE, HOSTILE: [HOSTILE]},
        "versions": {HOSTILE: HOSTILE},
        "hardware": HOSTILE,
        "started": HOSTILE,
        "pictures": [HOSTILE, "../x.png", "/etc/x.png", "javascript:x.png", "x.png](y) <b>.png", "https://x/y.png"],
    }
    return render_model_card(
        settings(**dict.fromkeys(names, HOSTILE)),
        METRICS,
        run,
        repo_id=HOSTILE,
        license=HOSTILE,
        license_link="javascript:alert(1)",
    )


@pytest.mark.parametrize("name", CARDS)
def test_every_card_is_well_formed_and_its_metadata_what_the_hub_takes(name):
    card = CARDS[name]()
    assert_well_formed(card)
    data = yaml.safe_load(str(card).split("---\n")[1])
    assert data["library_name"] == "hf_selortho" and data["pipeline_tag"] == "feature-extraction"
    assert all(isinstance(tag, str) for tag in data["tags"])
    for repository in (data.get("base_model"), *data.get("datasets", [])):
        assert repository is None or re.fullmatch(r"[\w.-]+/[\w.-]+", repository)
    for entry in data.get("model-index", []):
        assert entry["name"] and isinstance(entry["name"], str)
        for result in entry["results"]:
            assert result["task"]["type"] and result["dataset"]["name"]
            assert re.fullmatch(r"[\w./-]+", result["dataset"]["type"])
            metrics = result["metrics"]
            assert metrics and all(isinstance(metric["value"], int | float) and metric["type"] for metric in metrics)
            named = [(metric["type"], metric["name"]) for metric in metrics]
            assert len(set(named)) == len(named)


def test_probes_stand_beside_the_twin_and_the_dense_baseline():
    text = CARDS["probes beside a twin"]().text
    own, other = "0.700 (0.452 to 0.948)", "0.600 (0.352 to 0.848)"
    changed = f"{own} | {other} | +0.100 (+0.100 to +0.100)"
    assert f"| 16 features | {changed} | 0.900 | 0.800 | +0.100 |" in text
    assert "| the activations (dense) | 0.950 (0.950 to 0.950) |  |  | 0.950 |  |  |" in text
    assert "at most 400 texts were read" in text and "last 48 tokens" in text and "benchmark itself" not in text
    assert "| 1 feature | 0.700 (0.452 to 0.948) | 0.900 |" in CARDS["probes"]().text
    assert "0.750 with 16 features, 0.950 with the activations, over 4 sets" in CARDS["probes of the benchmark"]().text
    alike = render_model_card(settings(), probed(METRICS, 0.7), RUN, twin=probed(TWIN, 0.6, cap=FULL)).text
    assert "| Twin | Change |" not in alike  # probed on other texts


def test_the_table_of_several_saes_has_their_probes():
    saes = [
        SaeReport(name, settings(), probed(METRICS, auc)) for name, auc in (("layer_12", 0.7), ("layer_12_twin", 0.6))
    ]
    heading, own, twin = summary_rows(saes)
    assert [row[heading.index("AUC, k=16")] for row in (own, twin)] == ["0.7000", "0.6000"]


def test_seeds_are_shown_as_mean_and_spread():
    text = CARDS["three seeds with twin"]().text
    own, twins = [0.10299, 0.1041, 0.1021], [0.1012, 0.1002, 0.1022]
    shown = [f"{mean(values):.4f} ± {stdev(values):.6f}" for values in (own, twins)]
    assert f"| FVU | 0.1030 | {shown[0]} | 0.1012 | {shown[1]} |" in text
    assert f"| FVU | {shown[1]} | {shown[0]} | {100 * (mean(own) / mean(twins) - 1):+.1f}% |" in text
    assert "| Dead features | 1 (0.1%) | 2.000 ± 1.732 |" in text
    assert "over 3 seeds" in text and "One run each" not in text
    alone = CARDS["three seeds"]().text
    assert "| FVU | 0.1030 | 0.1034 ± " in alone and "No twin" in alone
    index = {r.metric_type: r.metric_value for r in CARDS["three seeds with twin"]().data.eval_results}
    assert index["fvu"] == EVALUATION["fvu"]  # that of the weights themselves


def test_one_card_speaks_of_all_layers():
    card = CARDS["three layers"]()
    text = card.text
    assert text.startswith("\n# `gemma2b`\n") and "3 sparse autoencoders" in text
    assert "decoder layers 5, 12 and 19" in text and "None" not in text
    for layer in (5, 12, 19):
        assert f"### Evaluation of `layer_{layer}`\n" in text and f"### What it did to `layer_{layer}`\n" in text
        assert re.search(rf"^\| `layer_{layer}` \| {layer} \| - \| {layer / 100:.4f}0? ", text, flags=re.MULTILINE)
        assert re.search(rf"^\| `layer_{layer}_twin` \| {layer} \| twin \| 0.1012 ", text, flags=re.MULTILINE)
        assert f"](layer_{layer}/pictures/training_curves.png)" in text
    assert "Evaluation of `layer_5_twin`" not in text
    assert 'subfolder="layer_5"' in text and '"layer_5/saelens"' in text
    values = {r.metric_name: r.metric_value for r in card.data.eval_results if r.metric_type == "fvu"}
    assert values["FVU (layer_12)"] == 0.12 and values["FVU (layer_12_twin)"] == 0.1012


TRANSCODER = {
    "site": "mlp_in", "target": "mlp_out", "skip": True, "d_out": 640,
    "hook_name": "model.layers.12.pre_feedforward_layernorm",
    "target_hook_name": "model.layers.12.post_feedforward_layernorm",
}  # fmt: skip


def test_a_transcoder_says_what_it_reads_and_reconstructs():
    card = render_model_card(settings(**TRANSCODER), METRICS, RUN)
    assert_well_formed(card)
    for part in (
        "Transcoder for `google/gemma-2-2b`, layer 12, `mlp_in → mlp_out`",
        "reads one place and reconstructs another: MLP output of decoder layer 12.",
        "| Reads | MLP input of decoder layer 12 (counted from 0), the output of `model.layers.12.pre_feed",
        "a linear map of what is read is added",
        "`sae.reconstruct(x)` to those that it reconstructs",
        "| Top-1 agreement | 41.4% |",
    ):
        assert part in card.text, part
    heads = render_model_card(settings(site="attn_z", hook_side="input"), METRICS, RUN).text
    assert "| Activations | attention heads of decoder layer 12 (counted from 0), the input of" in heads


def test_layers_replaced_at_once_stand_beside_the_twins():
    names = ("layer_3", "layer_12", "layer_3_twin", "layer_12_twin")
    saes = [SaeReport(name, settings(**TRANSCODER, layer=int(name.split("_")[1])), METRICS) for name in names]
    figures = {"layers": 2, "ce": 3.25, "ce_replaced": 4.5, "kl": 1.25, "top1_agreement": 0.5}
    card = SaeCard(saes, RUN, all_layers={"": figures, "twin": {**figures, "ce_replaced": 4.75}}).render()
    assert_well_formed(card)
    assert "## All 2 layers replaced at once" in card.text and "| Metric | Value | `twin` | What it is |" in card.text
    assert "| CE, replaced | 4.500 | 4.750 |" in card.text
    assert "MLP input of the decoder layers 3 and 12 (counted from 0), an SAE each" in card.text


def test_every_metric_is_in_the_model_index_and_in_the_table():
    card, data = CARDS["full"](), CARDS["full"]().data
    assert (data.base_model, data.base_model_relation) == ("google/gemma-2-2b", "adapter")
    assert (data.datasets, data.license, data.model_name) == (["fancyzhx/ag_news"], "apache-2.0", "gemma2b-l12")
    result = data.eval_results[0]
    assert (result.dataset_type, result.dataset_split) == ("fancyzhx/ag_news", "train")
    assert result.dataset_revision == "d" * 40
    index = {result.metric_type: result.metric_value for result in card.data.eval_results}
    beside = {"samples", "tokens", "ce_samples", "ce_tokens", "active_fraction", "dead_fraction"}
    assert index == {name: value for name, value in EVALUATION.items() if name not in beside}
    section = card.text.split("## Evaluation")[1].split("\n## ")[0]
    table = {line.split(" | ")[0][2:]: line.split(" | ")[1:3] for line in section.splitlines() if line[:2] == "| "}
    assert table["FVU"] == ["0.1030", "0.1012"]
    assert table["Top correlation"] == ["0.2813", "0.4402"]
    assert table["Dead features"] == ["1 (0.1%)", "0 (0.0%)"]
    assert table["Loss recovered"] == ["84.2%", "84.2%"]
    assert "1,000 contexts (52,821 tokens)" in card.text and "64 of these contexts (3,504" in card.text


def test_what_the_penalty_did():
    text = CARDS["full"]().text
    assert (
        "818,560 pairs" in text and "the 819 pairs of largest correlation" in text
    )  # n (n - 1) / 2 and its ceil(0.1%)
    assert "31.2% of the selected pairs were new" in text
    assert "| Top correlation | 0.4402 | 0.2813 | -36.1% |" in text
    assert "cannot say what the penalty changed" in CARDS["no twin"]().text
    none = CARDS["no penalty"]().text
    assert (
        "What the penalty did" not in none and "absorption" not in none and "*without* a decorrelation penalty" in none
    )
    assert "all pairs of the 1,280 features" in CARDS["full penalty"]().text


def test_local_sources_are_not_given_out_as_hub_repositories():
    config = settings(
        lm_name="/models/llama", lm_revision="local-sha256:ab", dataset="python-docs", dataset_revision=None
    )
    card = render_model_card(config, METRICS, RUN)
    assert not {"base_model", "base_model_relation", "datasets"} & set(card.data.to_dict())
    assert card.data.eval_results[0].dataset_type == "python-docs" and "Gemma" not in card.text


def test_the_embedded_model_is_named_as_what_it_is_and_under_whose_terms():
    config = settings(lm_name="gemma-3-270m", lm_revision="gguf-sha256:a5fd")
    card = render_model_card(config, METRICS, RUN)
    assert card.data.base_model == "google/gemma-3-270m"
    assert "Q4_K_M" in card.text and "https://ai.google.dev/gemma/terms" in card.text
    assert 'pip install "hf_selortho[demo]"' in card.text


def test_the_licence_is_the_publishers_to_state():
    assert CARDS["no twin"]().data.license is None
    assert "has not stated a licence for the weights" in CARDS["no twin"]().text
    assert "published under `apache-2.0`" in CARDS["full"]().text
    linked = render_model_card(settings(), METRICS, RUN, license="other", license_link="https://example.org/licence")
    assert "[`other`](https://example.org/licence)" in linked.text
    assert linked.data.to_dict()["license_link"] == "https://example.org/licence"


def test_unknown_sections_are_left_out():
    text = CARDS["nothing known"]().text
    for absent in ("## Evaluation", "## Training", "## Pictures", "## What the penalty did", "decorrelation penalty"):
        assert absent not in text
    assert "CE" not in CARDS["no cross-entropy"]().text
    assert "Pictures" not in CARDS["no pictures"]().text and "![" in CARDS["full"]().text


def test_hostile_names_stay_text():
    card = hostile_card()
    prose = without_code(card.text)
    for trace in ("<img", "javascript:", "onerror", "7 * 7", "[l]", "alert"):
        assert trace not in prose
    assert "![" not in card.text  # none of the pictures is a plain relative path
    headings = [line for line in prose.splitlines() if line.startswith("#")]
    assert headings[0] == "# CODE" and all(heading.startswith("## ") for heading in headings[1:])
    assert set(ModelCard(str(card)).data.to_dict()) == {
        *("library_name", "license", "pipeline_tag", "tags", "model-index")
    }


def test_access_tokens_do_not_reach_the_card():
    secret = "hf_" + "aB3" * 11
    run = {**RUN, "command": f"train.py --token {secret}", "arguments": {"token": secret, "trackers": [secret]}}
    assert secret not in str(render_model_card(settings(), METRICS, run, twin=TWIN))


@pytest.mark.parametrize(("arch", "prepend_bos"), [("gemma3", True), ("gpt2", False)])
def test_the_snippet_runs_as_pasted(arch, prepend_bos, tiny_lm_dir, tmp_path, capsys):
    folder = tiny_lm_dir(arch)
    revision = load_language_model(str(folder)).revision
    config = SelOrthoConfig(
        d_in=32, d_sae=64, lm_name=str(folder), lm_revision=revision, layer=2, hook_name="-", prepend_bos=prepend_bos
    )
    SelOrthoSAE(config).save_pretrained(tmp_path / "sae")
    card = render_model_card(config.own_settings(), {}, {"arguments": {"output_dir": str(tmp_path / "sae")}})
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(snippet, "snippet", "exec"), names)
    printed = capsys.readouterr().out.strip().splitlines()
    text = names["text"]
    assert len(printed) == len(text.token_ids) > 5
    assert [line.count(":") >= 5 for line in printed] == [not prepend_bos, *[True] * (len(printed) - 1)]
    lm = load_language_model(str(folder))
    with torch.no_grad():
        hidden = lm.model(text.token_ids[None], output_hidden_states=True).hidden_states[3][0]
        assert torch.allclose(text.feature_acts, names["sae"].encode(hidden), atol=1e-5)


def test_a_template_of_ones_own(tmp_path):
    template = tmp_path / "card.md"
    template.write_text(
        "---\n{{ card_data }}\n---\n{{ config.lm_name }} {{ saes[0].evaluation.l0 }}\n", encoding="utf-8"
    )
    card = render_model_card(settings(), METRICS, RUN, template=template)
    assert card.text == "`google/gemma-2-2b` 115.2\n" and card.data.base_model == "google/gemma-2-2b"
    with pytest.raises(SelOrthoError, match="cannot read the model card template"):
        render_model_card(settings(), METRICS, RUN, template=tmp_path / "absent.md")
    template.write_text("{% if %}", encoding="utf-8")
    with pytest.raises(SelOrthoError, match="does not render"):
        render_model_card(settings(), METRICS, RUN, template=template)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("config", {"d_in": 640}),
        ("config", {**SETTINGS, "d_sae": "wide"}),
        ("metrics", {"evaluation": {"fvu": 10**400}}),
        ("metrics", {"training": {"steps": "many", "tokens": 5}}),
        ("metrics", {"evaluation": {"probes": {"k": {"<b>": 1}}}}),
        ("run", {"arguments": [1]}),
        ("repo_id", 5),
        ("license_link", 5),
    ],
)
def test_facts_that_no_training_writes_are_refused(part, value):
    facts = {"config": settings(), "metrics": METRICS, "run": RUN, "twin": TWIN, part: value}
    with pytest.raises(SelOrthoError, match="config, metrics or run hold what no training writes"):
        render_model_card(**facts)


@pytest.mark.parametrize(
    ("changes", "loss", "pairs"),
    [
        ({}, "decorrelates the 0.1% that are most correlated in each batch.",
         "correlation (cosine over the tokens of the batch)"),
        ({"penalty_space": "decoder"},
         "turns apart the decoder directions of the 0.1% whose directions are most alike.",
         "decoder cosine"),
        ({"penalty_space": "exclusion"},
         "turns apart the decoder directions of the 0.1% whose directions are most alike, unless they fire together.",
         "decoder cosine, weighted by how rarely the two fire together,"),
        ({"penalty_space": "decoder", "selection_space": "activation"},
         "turns apart the decoder directions of the 0.1% that are most correlated in each batch.",
         "correlation (cosine over the tokens of the batch)"),
    ],
)  # fmt: skip
def test_the_card_says_what_the_penalty_squares_and_by_what_pairs_are_chosen(changes, loss, pairs) -> None:
    of_selected = {"top_correlation": 0.25, "peak_correlation": 0.5}
    metrics = {**METRICS, "training": of_selected, "training_start": of_selected}
    text = render_model_card(settings(**changes), metrics, RUN).text
    sentence = loss.replace("0.1%", "0.1% of feature pairs")
    assert f"the loss {sentence}" in text and f"pairs of largest {pairs} among" in text
    of_training = "decoder cosine" if pairs.startswith("decoder") else "correlation"
    assert f"Top {of_training} 0.2500; Peak {of_training} 0.5000" in text, "the score of the selected pairs"
    assert ("The decoder cosine of the selected pairs" in text) == (of_training == "decoder cosine")
    assert ("the pairs selected by the same rule" in text) == (of_training == "correlation")
