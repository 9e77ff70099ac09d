"""Pieces of HTML that several views share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from hf_selortho.features.index import FeatureIndex
from hf_selortho.features.records import (
    FeatureContext,
    FeatureRecord,
    FeatureSummary,
    JointContext,
    Neighbour,
    TokenEffect,
)
from hf_selortho.features.render import (
    bar_html,
    escape,
    histogram_html,
    label_html,
    legend_html,
    number,
    pair_tokens_html,
    percent,
    tokens_html,
    visible,
)

from .address import Address

BANDS = (0.8, 0.6, 0.4, 0.2, 0.0)  # quantiles of the activation, from above


def section(address: Address, title: str, body: str) -> str:
    """The content of a view, with its address, which the page's script writes into the browser's."""
    where = f'data-address="{escape(address.query())}" data-title="{escape(title)}"'
    return f'<section class="so-view" {where}>{body}</section>'


def problem(address: Address, words: str) -> str:
    """A view that cannot be shown, and why."""
    return section(address, "Problem", f'<div class="so-problem" role="alert">{escape(words)}</div>')


def note(words: str) -> str:
    """Something that a reader should know."""
    return f'<p class="so-note">{escape(words)}</p>'


def link(address: Address, inner: str, name: str = "") -> str:
    """A link within the page; `inner` is HTML."""
    classes = f' class="{name}"' if name else ""
    return f'<a href="{escape(address.query())}"{classes}>{inner}</a>'


def feature_link(sae: str, feature: int, label: str) -> str:
    """A link to a feature: its number and label."""
    inner = f'<span class="so-id">{feature}</span> {label_html(label)}'
    return link(Address(view="feature", sae=sae, id=feature), inner, "so-feature")


def label_of(index: FeatureIndex | None, feature: int) -> str:
    """The label of a feature, where there is an index."""
    return "" if index is None else index.label(feature)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str, name: str = "") -> str:
    """A table of HTML cells, which scrolls within itself on a narrow screen."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="so-scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="so-table {name}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values; the values are HTML."""
    return '<dl class="so-facts">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in pairs) + "</dl>"


def effects(title: str, found: Sequence[TokenEffect]) -> str:
    """Tokens that a feature promotes or suppresses, with their logits."""
    if not found:
        return f'<div><h4>{escape(title)}</h4><p class="so-empty">not known</p></div>'
    most = max(abs(effect.logit) for effect in found) or 1.0
    rows = "".join(
        f'<li><code class="so-token">{escape(visible(effect.token))}</code>{bar_html(abs(effect.logit) / most)}'
        f'<span class="so-num">{effect.logit:+.1f}</span></li>'
        for effect in found
    )
    return f'<div><h4>{escape(title)}</h4><ul class="so-effects">{rows}</ul></div>'


def neighbours(sae: str, index: FeatureIndex, title: str, found: Sequence[Neighbour]) -> str:
    """Features near another one."""
    if not found:
        return f'<div><h4>{escape(title)}</h4><p class="so-empty">none</p></div>'
    rows = [
        [
            feature_link(sae, n.feature, index.label(n.feature)),
            number(n.cosine, 2),
            number(n.correlation, 2),
            f"{n.support:,}",
        ]
        for n in found
    ]
    heads = ("feature", "cosine", "corr.", "both fire")
    return f"<div><h4>{escape(title)}</h4>{table(heads, rows, title, 'so-small')}</div>"


def context_html(context: FeatureContext, scale: float) -> str:
    """A context of a feature."""
    return (
        f'<li class="so-context"><span class="so-num" title="activation on the marked token">'
        f"{number(context.activation)}</span>"
        f"{tokens_html(context.tokens, context.activations, scale, context.peak)}"
        f'<span class="so-where">document {context.document_id}</span></li>'
    )


def contexts(record: FeatureRecord, most: int = 100) -> str:
    """The strongest contexts of a feature, and samples by quantile of its activation."""
    top = [c for c in record.contexts if c.kind == "top"][:most]
    samples = [c for c in record.contexts if c.kind == "sample"]
    scale = record.max_activation
    parts = [legend_html(scale, "activation")]
    parts.append(_group("Strongest contexts", top, scale))
    for band, members in groupby(samples, key=_band):
        title = f"Samples between the quantiles {percent(band)} and {percent(band + 0.2)} of its activations"
        parts.append(_group(title, list(members), scale))
    return "".join(parts)


def _group(title: str, members: Sequence[FeatureContext], scale: float) -> str:
    if not members:
        return ""
    rows = "".join(context_html(context, scale) for context in members)
    return f'<h4>{escape(title)}</h4><ul class="so-contexts">{rows}</ul>'


def _band(context: FeatureContext) -> float:
    return next((band for band in BANDS if context.quantile > band), 0.0)


def joint_contexts(found: Sequence[JointContext], scales: tuple[float, float]) -> str:
    """Contexts of a pair."""
    if not found:
        return '<p class="so-empty">none in the text of the index</p>'
    rows = "".join(
        f'<li class="so-context">{pair_tokens_html(c.tokens, c.activations_a, c.activations_b, scales, c.peak)}'
        f'<span class="so-where">document {c.document_id}</span></li>'
        for c in found
    )
    return f'<ul class="so-contexts">{rows}</ul>'


def feature_card(sae: str, index: FeatureIndex | None, feature: int, most: int = 3) -> str:
    """A feature in short."""
    if index is None:
        nothing = '<p class="so-empty">no feature index: nothing more is known</p>'
        return f'<div class="so-card"><h3>Feature {feature}</h3>{nothing}</div>'
    record = index.feature(feature)
    top = [context for context in record.contexts if context.kind == "top"][:most]
    return (
        f'<div class="so-card"><h3>{feature_link(sae, feature, record.label)}</h3>{frequency_facts(record)}'
        f'<div class="so-cols">{effects("Promotes", record.promoted[:5])}'
        f"{effects('Suppresses', record.suppressed[:5])}</div>"
        f"{_group('Strongest contexts', top, record.max_activation)}</div>"
    )


def frequency_facts(record: FeatureRecord) -> str:
    """How often and how strongly a feature fires."""
    return facts(
        [
            ("fires on", f"{percent(record.frequency)} of tokens"),
            ("strongest", number(record.max_activation)),
            ("mean when it fires", number(record.mean_activation)),
        ]
    )


def histogram(record: FeatureRecord) -> str:
    """The histogram of a feature, with its heading."""
    return f"<div><h4>Activations</h4>{histogram_html(record.histogram)}</div>"


def summaries(sae: str, found: Sequence[FeatureSummary], caption: str) -> str:
    """Features as a table."""
    rows = [[feature_link(sae, f.feature, f.label), percent(f.frequency), number(f.max_activation)] for f in found]
    return table(("feature", "fires on", "strongest"), rows, caption)
