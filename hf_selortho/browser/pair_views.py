"""The views of pairs: the table of those that the penalty acted on, and one of them."""

from __future__ import annotations

from typing import Any

from .. import SelOrthoError
from ..features.index import FeatureIndex
from ..features.records import PAIR_CLASSES, PairRecord
from ..features.render import curves_html, escape, label_html, number, percent
from . import parts
from .address import Address

PAIRS_ON_A_PAGE = 50
# What the table of pairs can be sorted by: the column, its heading and what it means.
PAIR_COLUMNS = {
    "score": ("trained", "score of the last selection of the training"),
    "correlation": ("now", "correlation on the text of the index"),
    "twin_correlation": ("twin", "correlation of the nearest features of the twin, trained without the penalty"),
    "decoder_cosine": ("cosine", "cosine of the decoder directions"),
    "support": ("both fire", "tokens on which both fire"),
}
CLASSES_IN_WORDS = {
    "duplicate": "fire together both ways and point alike",
    "nested": "one fires nearly only where the other does",
    "co-occurring": "fire together, for another reason",
    "unmeasured": "too rare on this text",
}


def pair_table(address: Address, index: FeatureIndex) -> str:
    """The pairs of an index, sorted, filtered and by pages."""
    address = address.to(sort=sort_column(index, address.sort))
    rows = sorted_pairs(index, address)
    pages = max(1, -(-len(rows) // PAIRS_ON_A_PAGE))
    page = min(max(address.page, 1), pages)
    shown = rows[(page - 1) * PAIRS_ON_A_PAGE : page * PAIRS_ON_A_PAGE]
    heads = ["pair", "class", *(_sort_head(address, name) for name in PAIR_COLUMNS)]
    cells = [
        [
            parts.link(
                Address(view="pairs", sae=address.sae, a=row["a"], b=row["b"]),
                f'<span class="so-id">{row["a"]} – {row["b"]}</span> {label_html(index.label(row["a"]))} · '
                f"{label_html(index.label(row['b']))}",
                "so-feature",
            ),
            f'<span class="so-class so-{escape(row["pair_class"])}">{escape(row["pair_class"])}</span>',
            *(f"{row[name]:,}" if name == "support" else number(row[name], 2) for name in PAIR_COLUMNS),
        ]
        for row in shown
    ]
    turn = [
        parts.link(address.to(page=target), name, "so-button")
        for name, target in (("‹ page before", page - 1), ("next page ›", page + 1))
        if 1 <= target <= pages
    ]
    return (
        _about_pairs(index) + _class_filter(address, index)
        + parts.table(heads, cells, f"{len(rows):,} pairs, page {page} of {pages}", "so-pairs")
        + f'<nav class="so-steps" aria-label="pages">{"".join(turn)}</nav>'
    )  # fmt: skip


def _about_pairs(index: FeatureIndex) -> str:
    about = index.facts["pairs"]
    if about.get("source") == "training":
        words = (
            f"The {index.pairs:,} strongest of the {about.get('selected', 0):,} pairs that the penalty acted on at "
            f"step {about.get('step')}, the last selection of the training."
        )
    else:
        words = (
            f"No selection of a training is known for this SAE: these are the {index.pairs:,} most correlated "
            "pairs on the text of the index."
        )
    rule = "".join(f"<li>{escape(part.strip())}</li>" for part in str(about.get("rule", "")).split(";") if part.strip())
    how = f"<details><summary>How the classes are told apart</summary><ul>{rule}</ul></details>" if rule else ""
    return f"{parts.note(words)}{how}"


def _class_filter(address: Address, index: FeatureIndex) -> str:
    counts = index.facts["pairs"].get("classes") or {}
    chips = [("", "all")] + [(name, f"{name} ({counts.get(name, 0):,})") for name in PAIR_CLASSES]
    links = "".join(
        f'<a href="{escape(address.to(only=value, page=1).query())}" class="so-button" '
        f"{'aria-current=true ' if value == address.only else ''}"
        f'title="{escape(CLASSES_IN_WORDS.get(value, ""))}">'
        f"{escape(name)}</a>"
        for value, name in chips
    )
    return f'<nav class="so-steps" aria-label="classes">{links}</nav>'


def _sort_head(address: Address, name: str) -> str:
    title, meaning = PAIR_COLUMNS[name]
    own = address.sort == name
    arrow = (" ▲" if address.up else " ▼") if own else ""
    target = address.to(sort=name, up=own and not address.up, page=1)
    return f'<a href="{escape(target.query())}" title="{escape(meaning)}; click to sort">{title}{arrow}</a>'


def pair_page(address: Address, index: FeatureIndex, pair: PairRecord, has_twin: bool) -> str:
    """Both features of a pair side by side, and what is known of the pair."""
    labels = [index.label(pair.a), index.label(pair.b)]
    scales = (index.summary(pair.a).max_activation, index.summary(pair.b).max_activation)
    steer = Address(view="steer", sae=address.sae, a=pair.a, b=pair.b)
    head = (
        f'<header class="so-head"><h2>Pair <span class="so-key so-a">A {pair.a}</span> '
        f'{label_html(labels[0])} · <span class="so-key so-b">B {pair.b}</span> {label_html(labels[1])}</h2>'
        f'<nav class="so-steps">{parts.link(Address(view="pairs", sae=address.sae), "‹ all pairs", "so-button")}'
        f"{parts.link(steer, 'steer with both', 'so-button')}</nav></header>"
    )
    contexts = "".join(
        f"<h4>{title}</h4>{parts.joint_contexts([c for c in pair.contexts if c.kind == kind], scales)}"
        for kind, title in (("both", "Both fire"), ("a", "Only A fires"), ("b", "Only B fires"))
    )
    cards = "".join(f"<div>{parts.feature_card(address.sae, index, one)}</div>" for one in (pair.a, pair.b))
    legend = (
        '<p class="so-legend"><span class="so-tok so-two" style="--s:.8">background: A</span> '
        '<span class="so-tok so-two" style="--b:.8">line below: B</span></p>'
    )
    body = (
        f'{head}{_pair_facts(pair, has_twin)}{_pair_history(pair)}<div class="so-cols">{cards}</div>{legend}{contexts}'
    )
    return parts.section(address.to(a=pair.a, b=pair.b), f"Pair {pair.a}, {pair.b}", body)


def _pair_facts(pair: PairRecord, has_twin: bool) -> str:
    twin = "–"
    if pair.twin_correlation is not None and has_twin:
        same = " (the same one)" if pair.twin_a == pair.twin_b else ""
        twin = (
            f"{number(pair.twin_correlation)} <small>between its features {pair.twin_a} and {pair.twin_b}{same}, "
            f"whose directions have cosines of {number(pair.twin_match_a, 2)} and {number(pair.twin_match_b, 2)} "
            "with these</small>"
        )
    return parts.facts(
        [
            (
                "class",
                f"{escape(pair.pair_class)} <small>{escape(CLASSES_IN_WORDS.get(pair.pair_class, ''))}</small>",
            ),
            ("in training, at the end", number(pair.score)),
            ("now, on held-out text", number(pair.correlation)),
            ("in the twin, without the penalty", twin),
            (
                "decoder cosine",
                f"{number(pair.decoder_cosine)} <small>twin {number(pair.twin_decoder_cosine)}</small>",
            ),
            ("both fire on", f"{pair.support:,} tokens <small>A {pair.fires_a:,}, B {pair.fires_b:,}</small>"),
            ("where B fires, A does", percent(pair.a_given_b)),
            ("where A fires, B does", percent(pair.b_given_a)),
        ]
    )


def _pair_history(pair: PairRecord) -> str:
    points = list(zip(pair.history_steps, pair.history, strict=True))
    known = sum(value is not None for _, value in points)
    if not known:
        return ""
    words = f"selected at {known} of {len(points)} looks; gaps: it was not among the selected pairs"
    curve = curves_html({"correlation": points}, "step", f"Correlation over the training ({words})", low=0.0)
    return f'<div class="so-half">{curve}</div>'


def sort_column(index: FeatureIndex, asked: str) -> str:
    """The column that the table of pairs is sorted by: the one that was asked for, else that of the selection.

    Raises:
        SelOrthoError: there is no such column.
    """
    chosen = "score" if index.facts["pairs"].get("source") == "training" else "correlation"
    if asked and asked not in PAIR_COLUMNS:
        raise SelOrthoError(f"sort={asked!r:.50}: expected one of {', '.join(PAIR_COLUMNS)}")
    return asked or chosen


def sorted_pairs(index: FeatureIndex, address: Address) -> list[dict[str, Any]]:
    """Rows of the table of pairs: filtered by class, feature number or label, sorted; the undefined come last."""
    rows: list[dict[str, Any]] = index.pair_table.to_pylist()
    if address.only:
        rows = [row for row in rows if row["pair_class"] == address.only]
    wanted = address.q.strip().lower()
    if wanted.isdecimal():
        rows = [row for row in rows if int(wanted) in (row["a"], row["b"])]
    elif wanted:
        rows = [row for row in rows if any(wanted in index.label(row[side]).lower() for side in "ab")]
    column = sort_column(index, address.sort)
    known = [row for row in rows if row[column] is not None]
    unknown = [row for row in rows if row[column] is None]
    known.sort(key=lambda row: row[column], reverse=not address.up)
    return known + unknown
