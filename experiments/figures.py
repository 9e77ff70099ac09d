"""Pictures of a study: what each penalty buys and costs, recovery of known features, the paper's training curves."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.analysis import RECIPES, SCORES, TWIN, Study, differences, gains
from hf_selortho.utils.plots import BLUE, GREY, STYLE, VERMILION, save_picture

LOOKS = {  # of the headline picture, by family of settings: colour, marker, words
    "activation": (VERMILION, "s", "correlations of 0.1% of pairs (the paper's)"),
    "activation-wide": ("#8C510A", ">", "correlations of 1% of pairs"),
    "decoder": (BLUE, "^", "decoder cosines of 0.1% of pairs"),
    "decoder-wide": ("#56B4E9", "<", "decoder cosines of 1% of pairs"),
    "both-nearest-wide": ("#AA3377", "p", "correlations of 1% and nearest directions"),
    "full": ("#E69F00", "P", "correlations of all pairs"),
    "ortsae": (GREY, "X", "OrtSAE"),
}
ROOM = 12  # percent of the twin's FVU; what costs more would leave the others a dot
BOUGHT = {
    "top_correlation_share": "mean of the top 0.1% correlations",
    "max_decoder_cosine_share": "mean maximum decoder cosine",
}
CURVES = {  # of the paper's Figures 1 and 2
    "fvu": "FVU",
    "l0": "L0",
    "peak_correlation": "peak correlation",
    "top_correlation": "mean of the top 0.1% correlations",
}
RUNS = {TWIN: ("#000000", "no penalty"), "selective-0.1": (VERMILION, "selective"), "full-0.1": (BLUE, "full")}


def draw_all(study: Study, folder: Path) -> None:
    """Draw every picture that there are records of."""
    folder.mkdir(parents=True, exist_ok=True)
    changes = {words: in_percent(study, name) for name, words in RECIPES.items() if name in study.compared}
    if changes:
        save_picture(headline_picture(changes), folder / "headline.png")
    if not study.synthetic.empty:
        save_picture(features_picture(study.synthetic), folder / "ground_truth.png")
    if "paper" in study.compared:
        save_picture(curves_picture(study.sweep("paper")), folder / "paper_curves.png")


def in_percent(study: Study, recipe: str) -> pd.DataFrame:
    """Differences of a recipe's settings from their twin, shares in percent; index: family, variant, seed."""
    found = differences(study.sweep(recipe))
    shares = [name for name in found if name.endswith("_share")]
    found[shares] *= 100
    return found.assign(family=[family(name) for name, _ in found.index]).set_index("family", append=True)


def family(variant: str) -> str:
    """Name what a setting is a strength of: "activation" of "activation-0.1"."""
    return re.sub(r"-\d+(\.\d+)?$", "", variant)


def headline_picture(changes: dict[str, pd.DataFrame]) -> Figure:
    """Draw what is bought against what it costs, both in percent of the twin's: a row for each recipe."""
    picture = new_picture(
        (9.2, 1.1 + 3.0 * len(changes)),
        f"What each penalty buys, and what it costs (up to {ROOM}% more FVU; ± standard deviation over seeds)",
    )
    with rc_context(STYLE):
        for row, (recipe, found) in enumerate(changes.items()):
            affordable = found.groupby(level="variant")["fvu_share"].transform("mean") <= ROOM
            for column, (key, words) in enumerate(BOUGHT.items()):
                axes = picture.add_subplot(len(changes), 2, 2 * row + column + 1, title=f"{recipe}: {words}")
                draw_families(axes, found[affordable], key)
                axes.set_ylabel("change, %")
                if row == len(changes) - 1:
                    axes.set_xlabel("more unexplained variance (FVU), % of the twin's")
        add_legend(picture, 2)
    return picture


def draw_families(axes: Axes, found: pd.DataFrame, key: str) -> None:
    """Draw a figure against FVU, a line for each family of settings, error bars of one standard deviation."""
    axes.axhline(0, color=GREY, linewidth=0.8)
    for name, (color, marker, words) in LOOKS.items():
        group = found[found.index.get_level_values("family") == name].groupby(level="variant")[["fvu_share", key]]
        mean = group.mean().sort_values("fvu_share")
        if not mean.empty:
            spread = group.std().reindex(mean.index).fillna(0.0)
            axes.errorbar(
                mean["fvu_share"], mean[key], xerr=spread["fvu_share"], yerr=spread[key], color=color, marker=marker,
                markersize=5, linewidth=1.2, elinewidth=0.8, capsize=2, label=words,
            )  # fmt: skip


def features_picture(synthetic: pd.DataFrame) -> Figure:
    """Draw the change of every score of every setting on synthetic data: a dot a training, a bar for the mean."""
    recipes = [name for name in RECIPES if name in synthetic.index.get_level_values("recipe")]
    found = {name: gains(synthetic, name) for name in recipes}
    names = list(pd.concat(found.values()).index.unique("variant"))
    picture = new_picture(
        (3.4 * len(SCORES), 1.5 + 0.34 * len(names)),
        "Recovery of known features, difference from the twin (dots: trainings; bars: means)",
    )
    with rc_context(STYLE):
        for number, key in enumerate(SCORES):
            axes = picture.add_subplot(1, len(SCORES), number + 1, title={"mcc": "MCC", "f1": "F1"}.get(key, key))
            axes.axvline(0, color="#000000", linewidth=0.8)
            for color, at, recipe in zip((BLUE, VERMILION), (-0.17, 0.17), recipes, strict=False):
                variants = found[recipe].index.get_level_values("variant")
                heights = variants.map(names.index) + at
                axes.plot(found[recipe][key], heights, "o", color=color, markersize=3, alpha=0.45)
                mean = found[recipe][key].groupby(heights).mean()
                axes.plot(mean, mean.index, "|", color=color, markersize=11, markeredgewidth=2.2, label=RECIPES[recipe])
            axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
            axes.invert_yaxis()
            axes.xaxis.set_major_locator(MaxNLocator(5))  # more numbers would run into one another
        add_legend(picture, 3)
    return picture


def curves_picture(sweep: pd.DataFrame) -> Figure:
    """Draw figures of trainings over their steps, mean and range over the seeds: the paper's Figures 1 and 2."""
    picture = new_picture((9.2, 6.4), "Training, mean and range over the seeds (the paper's Figures 1 and 2)")
    with rc_context(STYLE):
        for number, (key, words) in enumerate(CURVES.items()):
            axes = picture.add_subplot(2, 2, number + 1, title=words, xlabel="step")
            for variant, (color, name) in RUNS.items():
                if variant in sweep.index and f"curve.{key}" in sweep:
                    seeds = sweep.loc[[variant]]
                    lines = pd.concat(
                        [
                            pd.Series(values, index=steps, dtype=float)
                            for steps, values in zip(seeds["curve.step"], seeds[f"curve.{key}"], strict=True)
                        ],
                        axis=1,
                    )
                    axes.plot(lines.index, lines.mean(axis=1), color=color, linewidth=1.5, label=name)
                    axes.fill_between(lines.index, lines.min(axis=1), lines.max(axis=1), color=color, alpha=0.2, lw=0)
        add_legend(picture, 3)
    return picture


def new_picture(size: tuple[float, float], title: str) -> Figure:
    """Make an empty picture with its title at the left."""
    with rc_context(STYLE):
        picture = Figure(figsize=size, layout="constrained")
        picture.suptitle(title, x=0.01, ha="left")
    return picture


def add_legend(picture: Figure, columns: int) -> None:
    """Put the names of the first panel below all of them."""
    handles, labels = picture.axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=columns)
