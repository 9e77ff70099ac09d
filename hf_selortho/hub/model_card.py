"""The model card of a trained SAE: facts from its config, metrics and run, rendered by a Jinja template.

Whoever wants another card passes a template of their own; it is given the same values (see `card_context`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import SelOrthoError
from .card_facts import base_model, hub_id, is_commit, model_facts, training_facts, usage_facts
from .card_results import METRICS, evaluation_facts, penalty_facts, picture_facts
from .markdown import code, one_line

TEMPLATE_NAME = "model_card_template.md"
_TAGS = ["sparse-autoencoder", "sae", "interpretability", "mechanistic-interpretability", "selective-orthogonality"]

# What a value of another type or size raises on its way into the card.
_FACT_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def render_model_card(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    run: Mapping[str, Any],
    repo_id: str | None = None,
    twin: Mapping[str, Any] | None = None,
    license: str | None = None,
    license_link: str | None = None,
    template: str | os.PathLike[str] | None = None,
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

    Raises:
        SelOrthoError: the template cannot be read or rendered, or the facts are not those that a training writes.
    """
    path = Path(template) if template is not None else default_template()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SelOrthoError(f"cannot read the model card template {path} ({error}): pass another template") from error
    try:
        data = card_data(config, metrics, repo_id, license, license_link)
        context = card_context(config, metrics, run, repo_id, twin, license, license_link)
        card = ModelCard.from_template(data, template_str=text, **context)
    except _template_errors() as error:
        raise SelOrthoError(f"the model card template {path} does not render ({error}): correct it") from error
    except _FACT_ERRORS as error:
        raise SelOrthoError(
            f"config, metrics or run hold what no training writes ({type(error).__name__}: {one_line(error)[:300]}): "
            "take config.json, metrics.json and run.json from the folder of the run"
        ) from error
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
    return card


def card_context(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    run: Mapping[str, Any],
    repo_id: str | None = None,
    twin: Mapping[str, Any] | None = None,
    license: str | None = None,
    license_link: str | None = None,
) -> dict[str, Any]:
    """What the template is given, by who knows it: the config, the run, the evaluation, the publisher.

    Strings are safe Markdown already; a template puts them where it likes.
    """
    return {
        "model": model_facts(config, repo_id),
        "usage": usage_facts(config, run, repo_id),
        "training": training_facts(config, metrics, run),
        "evaluation": evaluation_facts(metrics, twin),
        "penalty": penalty_facts(config, metrics, twin),
        "pictures": picture_facts(run.get("pictures") or []),
        "dataset_name": code(config["dataset"]) if config.get("dataset") else None,
        "license_name": code(license) if license else None,
        "license_url": _web_link(license_link),
    }


def card_data(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    repo_id: str | None = None,
    license: str | None = None,
    license_link: str | None = None,
) -> ModelCardData:
    """The card's YAML block. Datasets and base models are named only if they are repositories of the Hub."""
    lm, dataset = base_model(config), hub_id(config.get("dataset"), config.get("dataset_revision"))
    results = _eval_results(config, metrics)
    return ModelCardData(
        library_name="hf_selortho",
        base_model=lm,
        # Without it the Hub would list the SAE as a fine-tuned copy of the language model. Of the relations that it
        # knows (finetune, adapter, quantized, merge), "adapter" is the one that leaves the base model as it is.
        base_model_relation="adapter" if lm else None,
        datasets=[dataset] if dataset else None,
        license=one_line(license) if license else None,
        license_link=_web_link(license_link),
        tags=_TAGS,
        model_name=one_line(repo_id or "sparse-autoencoder").split("/")[-1] if results else None,
        eval_results=results or None,
    )


def default_template() -> Path:
    """The template beside this file in an installed package, the repository's top level in a checkout."""
    beside = Path(__file__).with_name(TEMPLATE_NAME)
    return beside if beside.is_file() else Path(__file__).parents[2] / TEMPLATE_NAME


def _eval_results(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[EvalResult]:
    evaluation = metrics.get("evaluation") or {}
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
            metric_name=metric.name,
            metric_value=evaluation[metric.key],
        )
        for metric in METRICS
        if evaluation.get(metric.key) is not None
    ]


def _web_link(link: str | None) -> str | None:
    """A link that is nothing but one: anything else has no place in a card."""
    return link if link and re.fullmatch(r"https?://[\w.~:/?#@!$&'*+,;=%-]+", link, re.ASCII) else None


def _template_errors() -> type[Exception]:
    from jinja2 import TemplateError  # installed for huggingface_hub, which imports it this late too

    return TemplateError
