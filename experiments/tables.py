"""Tables of a study, in Markdown: short ones for RESULTS.md, and all of them for the page beside the records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from experiments.analysis import (
    RECIPES,
    SCORES,
    TWIN,
    Study,
    changed_tests,
    consistent,
    differences,
    gains,
    interval,
    is_twin,
    worth,
)

Column = tuple[str, str, int]  # key, heading, digits; keys that end in "_share" are shown in percent

CHANGES: list[Column] = [
    ("fvu", "FVU", 4),
    ("fvu_share", "FVU, %", 1),
    ("top_correlation_share", "top 0.1% correlation, %", 1),
    ("max_decoder_cosine_share", "max decoder cosine, %", 1),
    ("dead_features", "dead", 1),
    ("loss_recovered", "loss recovered", 3),
]
SAME_L1: list[Column] = [("l0_share", "L0 at the same L1, %", 1), ("same_l1_fvu_share", "FVU at the same L1, %", 1)]
TASK_CHANGES: list[Column] = [
    ("probing_accuracy_k1", "probing k=1", 3),
    ("probing_accuracy_k2", "k=2", 3),
    ("probing_accuracy_k5", "k=5", 3),
    ("probing_accuracy_all", "all features", 3),
    ("first_letter_f1", "first-letter F1", 3),
]
ABSORPTION: list[Column] = [
    ("absorption_rate", "absorption rate", 3),
    ("absorption_fraction", "absorption fraction", 4),
]
VALUES: list[Column] = [
    ("fvu", "FVU", 4),
    ("l0", "L0", 1),
    ("dead_features", "dead", 1),
    ("top_correlation", "top 0.1% correlation", 3),
    ("peak_correlation", "peak", 3),
    ("mean_correlation", "mean correlation", 3),
    ("max_decoder_cosine", "max decoder cosine", 3),
    ("loss_recovered", "loss recovered", 3),
]
PAPER: list[Column] = [("active_features", "active features", 1), ("unique_features", "features in the top pairs", 1)]
BATCHES: list[Column] = [
    ("spread_over_batches.top_correlation.std", "top 0.1%, std over batches", 4),
    ("spread_over_batches.peak_correlation.std", "peak, std over batches", 4),
    ("spread_over_batches.pair_churn.mean", "new pairs a step", 3),
]
SYNTHETIC: list[Column] = [
    ("explained_variance", "explained variance", 3),
    ("l0", "L0", 1),
    ("dead_features", "dead", 1),
    ("mcc", "MCC", 3),
    ("uniqueness", "uniqueness", 3),
    ("recovered", "recovered", 3),
    ("precision", "precision", 3),
    ("recall", "recall", 3),
    ("f1", "F1", 3),
    ("absorption", "absorption", 3),
    ("merged", "merged", 3),
]
GAINS: list[Column] = [
    ("fvu_share", "FVU, %", 1), ("mcc", "MCC", 3), ("uniqueness", "uniqueness", 3), ("recovered", "recovered", 3),
    ("f1", "F1", 3), ("precision", "precision", 3), ("absorption", "absorption", 3), ("l0", "L0", 1),
]  # fmt: skip
WISHES = [  # what a user wants, of which recipe, and the setting that comes nearest
    ("less correlation", "topk", "activation-0.03"),
    ("less correlation, cheaper", "topk", "activation-0.01"),
    ("less correlation", "relu", "activation-0.03"),
    ("less correlation, free at equal L0", "relu", "activation-wide-0.1"),
    ("directions less alike", "topk", "ortsae-0.1"),
    ("directions less alike, fewer dead", "topk", "decoder-wide-0.3"),
    ("directions less alike", "relu", "ortsae-0.25"),
    ("directions less alike, free at equal L0", "relu", "ortsae-0.1"),
    ("both (not reached)", "topk", "both-nearest-0.015"),
    ("both", "relu", "both-nearest-wide-0.3"),
    ("features that stand for true ones", "topk", "exclusion-wide-0.1"),
    ("features that stand for true ones", "relu", "exclusion-wide-0.1"),
]


def markdown(table: pd.DataFrame) -> str:
    """Write a table of text as Markdown; all columns but the index are aligned to the right."""
    names = [name or "" for name in table.index.names]
    lines = ["| " + " | ".join([*names, *table.columns]) + " |", "|:--" * len(names) + "|--:" * table.shape[1] + "|"]
    for key, row in zip(table.index, table.to_numpy(), strict=True):
        keys = key if isinstance(key, tuple) else (key,)
        lines.append("| " + " | ".join(str(value) for value in [*keys, *row]) + " |")
    return "\n".join(lines)


def over_seeds(
    table: pd.DataFrame, columns: Sequence[Column], spread: Callable[[pd.Series], float] | str = "std", sign: str = ""
) -> pd.DataFrame:
    """Show the mean of every variant over its seeds, ± a spread; a dash where nothing is known.

    Args:
        table: index: variant and others, over which the mean is.
        spread: what stands after ±, by default the standard deviation.
        sign: "+" for differences.
    """
    found = table.reindex(columns=[key for key, _, _ in columns]).astype(float)
    groups = found.groupby(level="variant", sort=False)
    mean, width = groups.mean(), groups.agg(spread)
    shown = pd.DataFrame(index=mean.index)
    for key, heading, digits in columns:
        scale = 100 if key.endswith("_share") else 1
        shown[heading] = [cell(scale * a, scale * b, digits, sign) for a, b in zip(mean[key], width[key], strict=True)]
    return named(shown)


def cell(mean: float, width: float, digits: int, sign: str = "") -> str:
    """Show a mean and half the width of its interval; a zero has no sign of its own."""
    if pd.isna(mean):
        return "-"
    shown = f"{round(mean, digits) + 0.0:{sign}.{digits}f}"
    return shown if pd.isna(width) else f"{shown} ± {width:.{digits}f}"


def named(table: pd.DataFrame) -> pd.DataFrame:
    """Show variants as code, the twins first."""
    names = sorted(table.index, key=lambda name: (name != TWIN, not is_twin(pd.Index([name]))[0]))
    return table.loc[names].set_axis(pd.Index([f"`{name}`" for name in names], name="setting"))


def changes_table(sweep: pd.DataFrame) -> pd.DataFrame:
    """What every variant of a sweep buys and costs against its twin, and whether it is worth it."""
    found = differences(sweep)
    moves = found["l0_share"].abs().max() > 0.01  # TopK holds L0, ReLU does not
    shown = over_seeds(found, CHANGES + SAME_L1 * bool(moves), interval, "+")
    marks = worth(sweep, found)
    shown["worth it"] = [", ".join(marks.columns[row]) or "-" for row in marks.to_numpy()]
    return shown


def tasks_table(sweep: pd.DataFrame) -> pd.DataFrame:
    """The twin's own results on the tasks, then how every other variant's differ; absorption as it is."""
    twin = over_seeds(sweep.loc[[TWIN]], TASK_CHANGES)
    changes = over_seeds(differences(sweep), TASK_CHANGES, interval, "+")
    absorption = over_seeds(sweep, ABSORPTION)
    return pd.concat([twin, changes]).join(absorption).rename_axis("setting")


def gains_table(synthetic: pd.DataFrame, recipe: str, columns: Sequence[Column]) -> pd.DataFrame:
    """Mean change on synthetic data; in how many trainings it is a rise; bold where that is no chance (sign test)."""
    found = gains(synthetic, recipe)
    groups, tests = found.groupby(level="variant", sort=False), changed_tests(found)
    shown = pd.DataFrame(index=groups.size().index)
    for key, heading, digits in columns:
        scale = 100 if key.endswith("_share") else 1
        texts = [cell(scale * mean, float("nan"), digits, "+") for mean in groups[key].mean()]
        if digits == 3:  # a score
            texts = [f"{text} ({(v > 0).sum()}/{v.count()})" for text, (_, v) in zip(texts, groups[key], strict=True)]
        if key in SCORES:
            sure = [consistent(values, tests) for _, values in groups[key]]
            texts = [f"**{text}**" if bold else text for text, bold in zip(texts, sure, strict=True)]
        shown[heading] = texts
    return named(shown)


def wishes_table(study: Study) -> pd.DataFrame:
    """What a user wants, the setting that comes nearest, and what it buys and costs."""
    found = {name: over_seeds(differences(study.sweep(name)), CHANGES[1:], interval, "+") for name in RECIPES}
    rows = {
        (wish, RECIPES[recipe], f"`{variant}`"): found[recipe].loc[f"`{variant}`"]
        for wish, recipe, variant in WISHES
        if f"`{variant}`" in found[recipe].index
    }
    return pd.DataFrame(rows).T.rename_axis(["you want", "SAE", "setting"])


def features_table(synthetic: pd.DataFrame) -> pd.DataFrame:
    """Changes on synthetic data of both recipes side by side."""
    columns = [column for column in GAINS if column[0] in ("mcc", "recovered", "f1", "fvu_share")]
    sides = [gains_table(synthetic, name, columns).add_prefix(f"{words}: ") for name, words in RECIPES.items()]
    return pd.concat(sides, axis=1).rename_axis("setting")


def baselines_table(synthetic: pd.DataFrame) -> pd.DataFrame:
    """Our SAEs without penalty on synthetic data, beside SAELens's."""
    source = synthetic.index.get_level_values("source")
    twins = synthetic[(source == "peers") | (synthetic.index.get_level_values("variant") == TWIN)]
    found = twins.groupby(level=["recipe", "source", "variant"]).mean().reset_index()
    found["SAE"] = [
        f"SAELens `{row.variant}`" if row.source == "peers" else f"ours, {RECIPES[row.recipe]}, no penalty"
        for row in found.itertuples()
    ]
    columns = [column for column in SYNTHETIC if column[0] in ("mcc", "f1", "recovered", "explained_variance", "l0")]
    shown = {heading: found[key].map(f"{{:.{digits}f}}".format) for key, heading, digits in columns}
    return pd.DataFrame(shown).set_index(found["SAE"])


def layers_table(study: Study) -> pd.DataFrame:
    """The paper's depths: every layer with and without the penalty."""
    sides = {}
    for layer in sorted(set(study.saes.index.get_level_values("layer"))):
        for name in ("layers", "paper"):
            sweep = study.sweep(name, layer)
            sweep = sweep[sweep.index.get_level_values("variant").isin([TWIN, "selective-0.1"])]
            if not sweep.empty:
                sides[str(layer)] = over_seeds(sweep, VALUES)
    return pd.concat(sides, names=["layer"]) if sides else pd.DataFrame()


def pair_classes_table(pairs: dict[str, Any]) -> pd.DataFrame:
    """The twin's most correlated pairs by class, and what became of those that have counterparts in another SAE."""
    columns = {
        "pairs": "pairs of the twin", "apart": "with counterparts", "halved": "correlation halved",
        "correlation": "correlation", "correlation_beside": "of the counterparts",
        "decoder_cosine": "decoder cosine", "decoder_cosine_beside": "cosine of the counterparts",
    }  # fmt: skip
    rows = {
        (f"`{pairs[side]}`", name): [facts[key] for key in columns]
        for side, classes in (("variant", "classes"), ("control", "control_classes"))
        if side in pairs
        for name, facts in pairs[classes].items()
        if facts["pairs"]
    }
    index = pd.MultiIndex.from_tuples(rows, names=["SAE beside the twin", "class"])
    shown = pd.DataFrame(list(rows.values()), index=index, columns=list(columns.values()))
    return shown.map(lambda value: f"{value:.2f}" if isinstance(value, float) else value)


def pairs_table(pairs: dict[str, Any]) -> pd.DataFrame:
    """Pairs to read: labels, correlation and decoder cosine before and after, and a context in which both fire."""
    rows = [
        {
            "pair": f"{plain(pair['label_a'])} / {plain(pair['label_b'])}", "kind": kind,
            "correlation": f"{pair['correlation']:.2f} → {pair['correlation_beside']:.2f}",
            "decoder cosine": f"{pair['decoder_cosine']:.2f} → {pair['decoder_cosine_beside']:.2f}",
            "both fire in": plain(pair["context"] or "-"),
        }
        for kind, key in (("fire alike", "separated"), ("nested", "nested"))
        for pair in pairs[key]
    ]  # fmt: skip
    columns = ["pair", "kind", "correlation", "decoder cosine", "both fire in"]
    return pd.DataFrame(rows, columns=columns).set_index("pair")


def plain(text: str) -> str:
    """Text of articles without what Markdown or HTML would make something of."""
    return "".join(" " if c in "<>|`*_[]#\\\n" else c for c in text).strip()


def all_tables(study: Study) -> dict[str, pd.DataFrame]:
    """Every table that there are records of, by the name that the pages call it."""
    sweeps = study.compared
    tables: dict[str, pd.DataFrame] = {}
    for name in [recipe for recipe in RECIPES if recipe in sweeps]:
        sweep = study.sweep(name)
        alike = study.stability[study.stability.index.get_level_values("sweep") == name].droplevel("sweep")
        tables |= {
            f"{name}-changes": changes_table(sweep),
            f"{name}-values": over_seeds(sweep, VALUES),
            f"{name}-tasks": tasks_table(sweep),
            f"{name}-seeds": named(alike.map("{:.3f}".format)).rename(columns=lambda key: key.replace("_", " ")),
        }
    if set(RECIPES) <= set(sweeps):
        tables["wishes"] = wishes_table(study)
    steered = study.sweep("topk-adaptive")
    if "topk" in sweeps and not steered.empty:
        tables["topk-steered"] = changes_table(pd.concat([study.sweep("topk").loc[[TWIN]], steered]))
    if "paper" in sweeps:
        sweep = study.sweep("paper")
        tables |= {
            "paper-changes": changes_table(sweep),
            "paper-values": over_seeds(sweep, PAPER + VALUES),
            "paper-layers": layers_table(study),
            "paper-batches": over_seeds(sweep, BATCHES),
        }
    if not study.timing.empty:
        shown = pd.DataFrame({"seconds a step": study.timing["seconds_per_step"].map("{:.3f}".format)})
        tables["timing"] = shown.assign(memory=study.timing["memory_bytes"].map(lambda size: f"{size / 1e6:.0f} MB"))
    if study.pairs:
        tables |= {"pair-classes": pair_classes_table(study.pairs), "pairs": pairs_table(study.pairs)}
    return tables | synthetic_tables(study.synthetic)


def synthetic_tables(synthetic: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Tables on synthetic data, whose features are known."""
    recipes = [recipe for recipe in RECIPES if recipe in synthetic.index.get_level_values("recipe")]
    tables = {f"synthetic-{name}": gains_table(synthetic, name, GAINS) for name in recipes}
    for (recipe, world), rows in synthetic.groupby(level=["recipe", "world"]):
        columns = [column for column in SYNTHETIC if column[0] in rows and rows[column[0]].notna().any()]
        tables[f"synthetic-{recipe}-{world}"] = over_seeds(rows, columns)
    if len(recipes) == len(RECIPES):
        tables |= {"features": features_table(synthetic), "baselines": baselines_table(synthetic)}
    return tables
