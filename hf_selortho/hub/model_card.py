"""Write the model card of trained SAEs: what is known of them, in the layout of a Jinja template.

Whoever wants another card passes a template of their own; it is given the same values (see [`SaeCard.values`]).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import TemplateError

from ..configuration_selortho import SITES, score_of_selection
from ..errors import SelOrthoError
from ..utils.hub import is_commit
from ..utils.privacy import LOCAL_MODEL
from ..utils.site_words import site_in_words
from .card_results import METRICS, SaeReport, all_layers_of, results_of, summary_rows, without_twins
from .markdown import Markdown, code, one_line, render

TEMPLATE_NAME = "model_card_template.md"
SAELENS_FOLDER = "saelens"  # of the export, beside the SAE
EMBEDDED_MODEL = "gemma-3-270m"
EMBEDDED_ORIGIN = "google/gemma-3-270m"  # the embedded model is a 4-bit copy of it
_TAGS = ["sparse-autoencoder", "sae", "interpretability", "mechanistic-interpretability", "selective-orthogonality"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# What a value of another type or size raises on its way into the card.
_FACT_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class SaeCard:
    """What a model card says of one or several SAEs of a run. What is unknown is left out."""

    # by the training and the evaluation
    saes: Sequence[SaeReport]
    run: Mapping[str, Any] = field(default_factory=dict)  # run.json: "command", "arguments", "versions", ...
    all_layers: Mapping[str, Any] = field(default_factory=dict, kw_only=True)  # of the run's metrics.json, by variant
    # by the Hub
    repo_id: str | None = None  # where the SAEs will be; None: the card is for a folder on this machine
    saelens: bool = False  # whether the repository has an export for SAELens
    # by the user: only the publisher of weights can grant a licence, so there is no default
    license: str | None = None  # of the *weights*, in the Hub's spelling ("apache-2.0", "gemma", "other")
    license_link: str | None = None  # its text, where it is not one of the Hub's list
    template: str | os.PathLike[str] | None = None  # path of another Jinja template
    terms: Markdown | None = None  # of the language model; None: so far as its name says

    def render(self) -> ModelCard:
        """Render the card.

        Raises:
            SelOrthoError: the template cannot be read or rendered, or the facts are not those that a training writes.
        """
        path = Path(self.template) if self.template is not None else default_template()
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SelOrthoError(
                f"cannot read the model card template {path} ({error}): pass another template"
            ) from error
        try:
            with _facts_of_a_training():
                return ModelCard(render(template, self.values()))
        except TemplateError as error:
            raise SelOrthoError(f"the model card template {path} does not render ({error}): correct it") from error

    def values(self) -> dict[str, Any]:
        """Return what the template is given.

        "saes" has what differs between several SAEs, twins left out; "config" what their settings have in common.
        """
        shown = without_twins(self.saes)
        first, common = shown[0], _common(shown)
        layers = list(dict.fromkeys(sae.layer for sae in shown))
        arguments = self.run.get("arguments") or {}
        return {
            "card_data": Markdown(self.data().to_yaml()),
            "saes": [{**results_of(sae), "penalty": _penalty(sae.config)} for sae in shown],
            "config": common,
            "layers": [] if None in layers else layers,
            **_places(first.config, [] if None in layers else layers),
            "all_layers": all_layers_of(self.all_layers),
            "training": first.metrics.get("training") or {},
            "data": first.metrics.get("data") or {},
            "run": self.run,
            "arguments": arguments,
            "summary": summary_rows(self.saes) if len(self.saes) > 1 else [],
            "folders": [sae.name for sae in self.saes],
            "place": str(self.repo_id or arguments.get("output_dir") or "."),
            "repo_id": self.repo_id,
            "title": self.repo_id.split("/")[-1] if self.repo_id else None,
            "saelens": f"{first.name}/{SAELENS_FOLDER}".lstrip("/") if self.saelens else None,
            "embedded": common.get("lm_name") == EMBEDDED_MODEL,
            "local_lm": common.get("lm_name") == LOCAL_MODEL,
            "terms": terms_of(common.get("lm_name")) if self.terms is None else self.terms,
            "license": self.license,
            "license_url": Markdown(_web_link(self.license_link) or ""),
        }

    def data(self) -> ModelCardData:
        """Return the YAML block. Datasets and base models are named only if they are repositories of the Hub."""
        common = _common(self.saes)
        lm, dataset = base_model(common), hub_id(common.get("dataset"), common.get("dataset_revision"))
        results = [result for sae in self.saes for result in _eval_results(sae)]
        name = one_line(self.repo_id or "sparse-autoencoder").split("/")[-1]
        return ModelCardData(
            library_name="hf_selortho",
            base_model=lm,
            # Without it the Hub would list the SAE as a fine-tuned copy of the language model. Of the relations that it
            # knows (finetune, adapter, quantized, merge), "adapter" is the one that leaves the base model as it is.
            base_model_relation="adapter" if lm else None,
            datasets=[dataset] if dataset else None,
            license=one_line(self.license) if self.license else None,
            license_link=_web_link(self.license_link),
            pipeline_tag="feature-extraction",  # of the Hub's tasks, the one whose output are vectors of features
            tags=_TAGS,
            model_name=name if results else None,
            eval_results=results or None,
        )


def render_model_card(
    config: Mapping[str, Any], metrics: Mapping[str, Any], run: Mapping[str, Any], **card: Any
) -> ModelCard:
    """Render the card of one SAE.

    Args:
        config: settings of the SAE (`SelOrthoConfig.own_settings()`).
        metrics: content of metrics.json: "evaluation", "training", "data".
        run: content of run.json; its "pictures" are shown.
        card: "twin", "seeds" and "twin_seeds" as of [`SaeReport`], the rest as of [`SaeCard`].

    Raises:
        SelOrthoError: as [`SaeCard.render`].
    """
    beside = {key: card.pop(key) for key in ("twin", "seeds", "twin_seeds") if key in card}
    with _facts_of_a_training():
        sae = SaeReport("", config, metrics, run.get("pictures") or (), **beside)
    return SaeCard([sae], run, **card).render()


def default_template() -> Path:
    """Return the template beside this file in an installed package, at the repository's top level in a checkout."""
    beside = Path(__file__).with_name(TEMPLATE_NAME)
    return beside if beside.is_file() else Path(__file__).parents[2] / TEMPLATE_NAME


def hub_id(name: Any, revision: Any) -> str | None:
    """Return `name` if it is a repository that was loaded from the Hub, which a commit as its revision proves."""
    return name if isinstance(name, str) and is_commit(revision) and _HUB_ID.fullmatch(name) else None


def base_model(config: Mapping[str, Any]) -> str | None:
    """Return the id of the language model on the Hub, None for a local one."""
    if config.get("lm_name") == EMBEDDED_MODEL:
        return EMBEDDED_ORIGIN
    return hub_id(config.get("lm_name"), config.get("lm_revision"))


def terms_of(lm: str | None) -> Markdown:
    """Return sentences on where a language model comes from and under whose terms it is, so far as its name says."""
    text = ""
    if lm == EMBEDDED_MODEL:
        origin = f"[{EMBEDDED_ORIGIN}](https://huggingface.co/{EMBEDDED_ORIGIN})"
        text += f" {code(lm)} is a copy of {origin} with weights quantised to about 4 bits (Q4_K_M)."
    if re.search(r"gemma(?![-_]?[4-9])", str(lm).lower()):
        text += (
            " Gemma is provided under and subject to the [Gemma Terms of Use](https://ai.google.dev/gemma/terms), "
            "which include a prohibited use policy; read them before you use or redistribute anything made with Gemma."
        )
    return Markdown(text)


@contextmanager
def _facts_of_a_training() -> Iterator[None]:
    """Turn what facts of other types raise, which no training writes, into a SelOrthoError."""
    try:
        yield
    except _FACT_ERRORS as error:
        said = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise SelOrthoError(
            f"config, metrics or run hold what no training writes ({said}): take config.json, metrics.json and "
            "run.json from the folder of the run"
        ) from error


def _common(saes: Sequence[SaeReport]) -> dict[str, Any]:
    """Return the settings that all of them share."""
    first, *others = (sae.config for sae in saes)
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _places(config: Mapping[str, Any], layers: Sequence[Any]) -> dict[str, Any]:
    """Return in words what is read and, of transcoders, reconstructed: "reads", "reconstructs"; "site" if unusual."""
    site, target = config.get("site") or "resid_post", config.get("target")

    def words(place: str) -> Markdown:
        text = site_in_words(place, layers)
        return Markdown(text if place in SITES and all(isinstance(n, int) for n in layers) else text and code(text))

    shown = f"{site} → {target}" if target else site
    return {
        "reads": words(site),
        "reconstructs": words(target) if target else "",
        "site": shown if shown != "resid_post" else "",
    }


def _penalty(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the penalty acted on: its kind, how many pairs, what is squared, by what pairs are selected."""
    pairs, share = config["d_sae"] * (config["d_sae"] - 1) // 2, config.get("pair_fraction")
    active = config.get("penalty") in ("selective", "full", "ortsae") and config.get("ortho_coefficient", 0) > 0
    space = config.get("penalty_space", "activation")
    return {
        "kind": config["penalty"] if active else "none" if config.get("penalty") else None,
        "pairs": pairs,
        "selected": math.ceil(share * pairs) if share else None,
        "squares": space,
        "selects": score_of_selection(space, config.get("selection_space", "same")),
        "beside": config.get("decoder_pairs", "alike") if config.get("decoder_ratio", 0) > 0 else None,
    }


def _eval_results(sae: SaeReport) -> list[EvalResult]:
    """Return the metrics of the SAE that is published, not the means over other seeds."""
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


def _web_link(link: str | None) -> str | None:
    """Return a link that is nothing but one: anything else has no place in a card."""
    return link if link and re.fullmatch(r"https?://[\w.~:/?#@!$&'*+,;=%-]+", link, re.ASCII) else None
