"""The model card of a trained SAE: facts from its config, metrics and run, rendered by a Jinja template.

Whoever wants another card passes a template of their own; it is given the same values (see `card_context`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import SelOrthoError
from ..utils.hub import is_commit
from .card_facts import base_model, hub_id, model_facts, training_facts, usage_facts
from .card_results import METRICS, Measured, evaluation_facts, penalty_facts, picture_facts
from .markdown import code, one_line
from .summary import SaeReport, summary_rows, without_twins

TEMPLATE_NAME = "model_card_template.md"
_TAGS = ["sparse-autoencoder", "sae", "interpretability", "mechanistic-interpretability", "selective-orthogonality"]

# What a value of another type or size raises on its way into the card.
_FACT_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Publisher:
    """What only the publisher of an SAE knows."""

    repo_id: str | None = None  # where on the Hub the SAE will be; None: the card is for a folder on this machine
    license: str | None = None  # of the *weights*, in the Hub's spelling ("apache-2.0", "gemma", "other")
    license_link: str | None = None  # its text, where it is not one of the Hub's list
    saelens: bool = False  # whether the repository has an export for SAELens


def render_model_card(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    run: Mapping[str, Any],
    repo_id: str | None = None,
    twin: Mapping[str, Any] | None = None,
    license: str | None = None,
    license_link: str | None = None,
    template: str | os.PathLike[str] | None = None,
    seeds: Sequence[Mapping[str, Any]] = (),
    twin_seeds: Sequence[Mapping[str, Any]] = (),
) -> ModelCard:
    """Render the card of an SAE. What is unknown is left out.

    Args:
        config: settings of the SAE (`SelOrthoConfig.own_settings()`).
        metrics: content of metrics.json: "evaluation", "training", "data".
        run: content of run.json: "command", "arguments", "versions", "hardware", "wall_seconds", "pictures", ...
        repo_id: where on the Hub the SAE will be; the snippet loads it from there, else from the output folder.
        twin: metrics of the same run with `ortho_coefficient = 0`, shown beside.
        license: identifier of the licence of the *weights*, in the Hub's spelling ("apache-2.0", "gemma", "other").
            Only their publisher can grant one, so there is no default: without it the card says that none is stated.
        license_link: text of the licence, where it is not one of the Hub's list.
        template: path of another Jinja template.
        seeds, twin_seeds: metrics of the same run and of its twin with other seeds; means and spread are shown.

    Raises:
        SelOrthoError: the template cannot be read or rendered, or the facts are not those that a training writes.
    """
    try:
        sae = SaeReport("", config, Measured(metrics, twin, seeds, twin_seeds), run.get("pictures") or ())
    except _FACT_ERRORS as error:
        raise wrong_facts(error) from error
    return render_card([sae], run, Publisher(repo_id, license, license_link), template)


def render_card(
    saes: Sequence[SaeReport],
    run: Mapping[str, Any],
    publisher: Publisher = Publisher(),
    template: str | os.PathLike[str] | None = None,
) -> ModelCard:
    """Render one card for one or several SAEs of a run; see [`render_model_card`]."""
    path = Path(template) if template is not None else default_template()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SelOrthoError(f"cannot read the model card template {path} ({error}): pass another template") from error
    try:
        data = card_data(saes, publisher)
        card = ModelCard.from_template(data, template_str=text, **card_context(saes, run, publisher))
    except _template_errors() as error:
        raise SelOrthoError(f"the model card template {path} does not render ({error}): correct it") from error
    except _FACT_ERRORS as error:
        raise wrong_facts(error) from error
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
    return card


def card_context(saes: Sequence[SaeReport], run: Mapping[str, Any], publisher: Publisher) -> dict[str, Any]:
    """What the template is given, by who knows it: the config, the run, the evaluation, the publisher.

    "saes" has what differs between several SAEs, twins left out; "evaluation", "penalty" and "pictures" are those of
    the first. Strings are safe Markdown already; a template puts them where it likes.
    """
    shown = without_twins(saes)
    first, common = shown[0], _common([sae.config for sae in shown])
    of_each = [
        {
            "name": code(sae.name) if sae.name else None,
            "evaluation": evaluation_facts(sae.measured),
            "penalty": penalty_facts(sae.config, sae.measured),
            "pictures": picture_facts(sae.pictures),
        }
        for sae in shown
    ]
    layers = list(dict.fromkeys(sae.config.get("layer") for sae in shown))
    return {
        **of_each[0],
        "saes": of_each,
        "summary": summary_rows(saes) if len(saes) > 1 else [],
        "folders": [code(sae.name) for sae in saes],
        "model": model_facts(common, publisher.repo_id, layers),
        "usage": usage_facts(first.config, run, publisher.repo_id, first.name, publisher.saelens),
        "training": training_facts(common, first.metrics, run, layers),
        "dataset_name": code(common["dataset"]) if common.get("dataset") else None,
        "license_name": code(publisher.license) if publisher.license else None,
        "license_url": _web_link(publisher.license_link),
    }


def card_data(saes: Sequence[SaeReport], publisher: Publisher) -> ModelCardData:
    """The card's YAML block. Datasets and base models are named only if they are repositories of the Hub."""
    common = _common([sae.config for sae in saes])
    lm, dataset = base_model(common), hub_id(common.get("dataset"), common.get("dataset_revision"))
    results = [result for sae in saes for result in _eval_results(sae)]
    name = one_line(publisher.repo_id or "sparse-autoencoder").split("/")[-1]
    return ModelCardData(
        library_name="hf_selortho",
        base_model=lm,
        # Without it the Hub would list the SAE as a fine-tuned copy of the language model. Of the relations that it
        # knows (finetune, adapter, quantized, merge), "adapter" is the one that leaves the base model as it is.
        base_model_relation="adapter" if lm else None,
        datasets=[dataset] if dataset else None,
        license=one_line(publisher.license) if publisher.license else None,
        license_link=_web_link(publisher.license_link),
        pipeline_tag="feature-extraction",  # of the Hub's tasks, the one whose output are vectors of features
        tags=_TAGS,
        model_name=name if results else None,
        eval_results=results or None,
    )


def default_template() -> Path:
    """The template beside this file in an installed package, the repository's top level in a checkout."""
    beside = Path(__file__).with_name(TEMPLATE_NAME)
    return beside if beside.is_file() else Path(__file__).parents[2] / TEMPLATE_NAME


def _common(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all of them share."""
    first, *others = configs
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _eval_results(sae: SaeReport) -> list[EvalResult]:
    """The metrics of the SAE that is published, not the means over other seeds."""
    config, evaluation = sae.config, sae.metrics.get("evaluation") or {}
    dataset = one_line(config.get("dataset") or "held-out text")
    revision = config.get("dataset_revision")
    return [
        EvalResult(
            task_type="feature-extraction",
            task_name="Sparse autoencoder of language-model activations",
            dataset_type=hub_id(dataset, revision)
            or re.sub(r"[^\w.-]+", "-", Path(dataset).name, flags=re.ASCII).strip("-"),
            dataset_name=f"{dataset} (held-out documents)",
            dataset_split=one_line(config["dataset_split"]) if config.get("dataset_split") else None,
            dataset_revision=revision if is_commit(revision) else None,
            metric_type=metric.key,
            metric_name=f"{metric.name} ({one_line(sae.name)})" if sae.name else metric.name,
            metric_value=evaluation[metric.key],
        )
        for metric in METRICS
        if evaluation.get(metric.key) is not None
    ]


def wrong_facts(
    error: Exception,
    what: str = "config, metrics or run hold",
    maker: str = "training",
    remedy: str = "config.json, metrics.json and run.json from the folder of the run",
) -> SelOrthoError:
    """The error for facts of other types than those that our own code writes down."""
    said = f"{type(error).__name__}: {one_line(error)[:300]}"
    return SelOrthoError(f"{what} what no {maker} writes ({said}): take {remedy}")


def _web_link(link: str | None) -> str | None:
    """A link that is nothing but one: anything else has no place in a card."""
    return link if link and re.fullmatch(r"https?://[\w.~:/?#@!$&'*+,;=%-]+", link, re.ASCII) else None


def _template_errors() -> type[Exception]:
    from jinja2 import TemplateError  # installed for huggingface_hub, which imports it this late too

    return TemplateError
