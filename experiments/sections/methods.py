"""Section that compares methods with their twins, at equal L0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..comparison import (
    BOUGHT,
    CORRELATION_CUT,
    COSINE_CUT,
    FVU_ROOM,
    RELATIVE_ROOM,
    Comparison,
    best_by,
    best_of_both,
    comparisons,
    left_out,
    nearest_to_both,
)
from ..figures import drawn_in_headline, family, headline_figure, pareto_figure
from ..findings import Findings
from ..summaries import NAMES, Summary, is_twin, paired, twin_among
from ..tables import METHOD_COLUMNS, comparison_table, summary_table


def pareto(findings: Findings, figures: Path, link: str) -> str:
    """Methods against one another at equal L0."""
    if not findings.pareto:
        return ""
    parts = [
        "## Methods at equal L0\n\nEvery variant against its twin, the same run without penalty: same "
        "batches, same initial weights. *FVU*: how much more than the twin's at equal L0 (for ReLU, twins of several "
        "L1 are interpolated, as logarithms). The other columns are differences from the twin at equal L0: relative "
        "ones of correlation and cosine, absolute ones of dead features (at its own L0) and loss recovered. *Worth "
        f"it*, in the means over the seeds: at most {FVU_ROOM} more FVU and no more dead features than the twin's "
        f"number varies by between seeds, for {CORRELATION_CUT:.0%} less of the top correlations (correlation) or "
        f"{COSINE_CUT:.0%} less of the mean maximum decoder cosine (cosine); *both*: both of them for at most "
        f"{RELATIVE_ROOM:.0%} of the twin's FVU. A coefficient multiplies a mean over the pairs that the penalty acts "
        "on, a thousand times as many with `full` as with the paper's share of 0.1%."
    ]
    compared = {NAMES.get(sweep, sweep): comparisons(findings.of(sweep)) for sweep in findings.pareto}
    if drawn := {name: found for name, found in compared.items() if found}:
        headline_figure(drawn, figures / "headline.png")
        parts.append(f"![What each penalty buys and costs]({link}/headline.png)\n\n{headline_words(drawn)}")
    for sweep in findings.pareto:
        summaries = findings.of(sweep)
        name = NAMES.get(sweep, sweep)
        parts.append(f"### {name}")
        if found := compared[name]:
            title = f"{name}: what each method buys, against its price"
            pareto_figure(found, figures / f"pareto_{sweep}.png", title)
            parts += [f"![{name}]({link}/pareto_{sweep}.png)", pareto_words(name, found), comparison_table(found)]
            parts += filter(None, [pruned_words(found), sparser_words(summaries)])
            if outside := left_out(summaries, found):
                names = ", ".join(f"`{variant}`" for variant in outside)
                parts.append(f"Left out, as the L0 of no twins encloses theirs: {names}.")
        parts.append(summary_table(summaries, METHOD_COLUMNS))
    return "\n\n".join(parts)


TELLING = 0.1  # relative change from which a penalty is said to lower something


def headline_words(compared: Mapping[str, Sequence[Comparison]]) -> str:
    """What the figure shows: which families lower correlations, cosines or both."""
    lines = []
    for name, found in compared.items():
        kinds: dict[str, list[str]] = {"correlations alone": [], "cosines alone": [], "both": []}
        for group in dict.fromkeys(family(one.summary.variant) for one in found):
            shown = [one for one in found if family(one.summary.variant) == group and drawn_in_headline(one)]
            lowers = [any(getattr(one, key).mean <= -TELLING for one in shown) for key in ("correlation", "cosine")]
            if any(lowers):
                kind = "both" if all(lowers) else "correlations alone" if lowers[0] else "cosines alone"
                kinds[kind].append(f"`{group}`")
        told = [f"{kind}: {', '.join(groups)}" for kind, groups in kinds.items() if groups]
        lines.append(f"{name}: {'; '.join(told) or 'none'}.")
    return (
        f"Penalties that lower these figures by {TELLING:.0%} or more, at prices that the figure has room for. "
        f"{' '.join(lines)} Families that are not drawn are in the tables below."
    )


def pareto_words(name: str, found: Sequence[Comparison]) -> str:
    """What a figure shows, in sentences."""
    words = []
    for key, what in BOUGHT.items():
        best = best_by(found, key)
        if best is None:
            words.append(f"No variant stays within {FVU_ROOM} of the twin's FVU without more dead features.")
        else:
            cut: Any = getattr(best, key)
            words.append(
                f"Within {FVU_ROOM} of the twin's FVU and without more dead features, `{best.summary.variant}` "
                f"changes the {what} most: {cut.percent()} for {best.fvu_excess.signed(4)} FVU."
            )
    if (best := best_of_both(found)) is not None:
        words.append(
            f"Both at once, for at most {RELATIVE_ROOM:.0%} of FVU: `{best.summary.variant}`, correlation "
            f"{best.correlation.percent()} and cosine {best.cosine.percent()} for {best.relative_excess.percent()}."
        )
    elif (near := nearest_to_both(found)) is not None:
        words.append(
            f"None of the {len(found)} variants buys both cuts for at most {RELATIVE_ROOM:.0%} of FVU; least is missed "
            f"by `{near.summary.variant}`: correlation {near.correlation.percent()}, cosine "
            f"{near.cosine.percent()} for {near.relative_excess.percent()}."
        )
    return f"{name}: " + " ".join(words)


PRUNED = -0.05  # of the twin's L0, below which a penalty counts as one that makes activations sparser


def pruned_words(found: Sequence[Comparison]) -> str:
    """Which penalties lower L0 by themselves, and what their FVU is at the twin's L1."""
    told = []
    for one in found:
        l0 = paired(one.summary, one.twin, "l0", relative=True)
        fvu = paired(one.summary, one.twin, "fvu", relative=True)
        if one.twins and l0 is not None and fvu is not None and l0.mean <= PRUNED:
            told.append(f"`{one.summary.variant}` ({l0.mean:+.0%} L0, {fvu.mean:+.1%} FVU)")
    if not told:
        return ""
    return (
        "Some penalties lower L0 by themselves, as a larger L1 would. At equal L0 they then cost less than at the same "
        f"L1, whose users see: {', '.join(told)}."
    )


def sparser_words(summaries: Sequence[Summary]) -> str:
    """What twins of another k lose and what they gain: what is to be had without a penalty."""
    twin = twin_among(summaries)
    if twin is None or not twin.settings.get("k"):
        return ""
    told = []
    for other in summaries:
        if other is twin or not is_twin(other.variant):
            continue
        figures = [paired(other, twin, key, relative=True) for key in ("fvu", "top_correlation", "max_decoder_cosine")]
        known = [figure.percent() for figure in figures if figure is not None]
        if len(known) == len(figures):
            fvu, correlation, cosine = known
            told.append(f"`{other.variant}`: FVU {fvu}, correlation {correlation}, cosine {cosine}")
    return f"Without penalty, at another k: {'; '.join(told)}." if told else ""
