"""Read the records of a study into pandas tables, and compare every SAE with its twin baseline.

The twin baseline is the same run without the penalty: same batches, same initial weights. Differences are taken seed by
seed; intervals are Student's t over the seeds, 95%.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from experiments.records import read_record

TWIN = "none"  # variant without a penalty; twins of another L1 or k are called "none-..."
RECIPES = {"topk": "TopK", "relu": "ReLU + L1"}  # sweeps that compare penalties at one layer
LEVEL = 0.05  # of the intervals and sign tests

EQUAL_L0 = [
    "fvu",
    "top_correlation",
    "peak_correlation",
    "max_decoder_cosine",
    "loss_recovered",
]  # compared at equal L0
TASKS = ["probing_accuracy_k1", "probing_accuracy_k2", "probing_accuracy_k5", "probing_accuracy_all", "first_letter_f1"]
SCORES = ["mcc", "uniqueness", "recovered", "f1"]  # of known features, higher is better

FVU_ROOM = 0.004  # more FVU that a cut may cost at equal L0
FVU_SHARE = 0.01  # share of the twin's FVU that both cuts together may cost
CORRELATION_CUT, COSINE_CUT = 0.25, 0.40  # shares of the twin's top correlation and mean maximum decoder cosine


@dataclass(frozen=True)
class Study:
    """All records of one plan."""

    saes: pd.DataFrame  # one row an SAE, index: sweep, layer, variant, seed
    synthetic: pd.DataFrame  # one row an SAE on synthetic data, index: recipe, world, seed, source, variant
    stability: pd.DataFrame  # one row a variant: how alike its seeds are
    pairs: dict[str, Any]  # the twin's most correlated pairs of features; empty if not measured
    timing: pd.DataFrame  # one row a timed training step, index: label

    @classmethod
    def read(cls, folder: Path) -> Study:
        """Read every record below a folder."""
        records = [read_record(path) for path in sorted(folder.rglob("*.json"))]
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            by_kind.setdefault(record["kind"], []).append(record)
        stability = pd.DataFrame(by_kind.get("seeds", []), columns=["sweep", "variant", *STABILITY])
        return cls(
            sae_table(by_kind.get("sae", [])),
            synthetic_table(by_kind.get("world", [])),
            stability.set_index(["sweep", "variant"]),
            next(iter(by_kind.get("examples", [])), {}),
            pd.DataFrame(
                [row for record in by_kind.get("timing", []) for row in record["rows"]], columns=["label", *TIMED]
            ).set_index("label"),
        )

    @property
    def compared(self) -> list[str]:
        """Names of the sweeps that have a twin and something to compare with it."""
        variants = self.saes.reset_index().groupby("sweep")["variant"].agg(set)
        return [name for name, found in variants.items() if TWIN in found and not is_twin(pd.Index(found)).all()]

    def sweep(self, name: str, layer: int | None = None) -> pd.DataFrame:
        """SAEs of a sweep at one layer, by default its first; index: variant, seed."""
        rows = self.saes[self.saes.index.get_level_values("sweep") == name].droplevel("sweep")
        layers = rows.index.get_level_values("layer")
        return rows[layers == (layers.min() if layer is None else layer)].droplevel("layer")


STABILITY = ["max_cosine", "matched_cosine", "shared_features", "distinct_directions_per_feature"]
TIMED = ["seconds_per_step", "memory_bytes"]


def sae_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row an SAE: figures of its evaluation by name, other facts with a dot, such as "training.fvu"."""
    index = ["sweep", "layer", "variant", "seed"]
    table = pd.json_normalize(records) if records else pd.DataFrame(columns=index)
    table.columns = [name.removeprefix("evaluation.") for name in table.columns]
    return table.set_index(index)


def synthetic_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row an SAE on synthetic data; source "scores" is ours, "peers" is SAELens's."""
    rows = [
        {"recipe": record["recipe"], "world": record["world"]["name"], "seed": record["seed"], "source": source,
         "variant": variant, "fvu": 1 - scores["explained_variance"], **scores}
        for record in records
        for source in ("scores", "peers")
        for variant, scores in record[source].items()
    ]  # fmt: skip
    index = ["recipe", "world", "seed", "source", "variant"]
    return pd.DataFrame(rows, columns=None if rows else index).set_index(index)


def is_twin(variants: pd.Index) -> np.ndarray:
    """Say which variants have no penalty."""
    return np.array([name == TWIN or name.startswith(f"{TWIN}-") for name in variants], dtype=bool)


def differences(sweep: pd.DataFrame) -> pd.DataFrame:
    """Compare every variant of a sweep with its twin, one row a variant and seed.

    TopK has its twin's L0 anyway. ReLU does not: its twins of several L1 are interpolated, log(figure) linear in
    log(L0), and the figure expected at the variant's own L0 is what it is compared with. Nothing is extrapolated: such
    cells are NaN. Columns ending in "_share" are relative to the twin; dead features and the tasks are compared with
    the twin itself, as are "l0_share" and "same_l1_fvu_share".
    """
    rows = []
    twins = sweep[is_twin(sweep.index.get_level_values("variant"))]
    for (variant, seed), own in sweep.drop(twins.index).iterrows():
        if (TWIN, seed) not in twins.index:
            continue
        twin, known = twins.loc[(TWIN, seed)], twins.xs(seed, level="seed").sort_values("l0")
        row = {"variant": variant, "seed": seed}
        for key in EQUAL_L0:
            expected = twin[key] if own["arguments.activation"] != "relu" else interpolate(known, key, own["l0"])
            row |= {key: own[key] - expected, f"{key}_share": own[key] / expected - 1}
        row |= {key: own[key] - twin[key] for key in ("dead_features", *TASKS) if key in sweep}
        row |= {"l0_share": own["l0"] / twin["l0"] - 1, "same_l1_fvu_share": own["fvu"] / twin["fvu"] - 1}
        rows.append(row)
    return pd.DataFrame(rows).set_index(["variant", "seed"])


def interpolate(twins: pd.DataFrame, key: str, l0: float) -> float:
    """Expect a figure of a twin at an L0 between those of known twins; NaN outside of them."""
    known = np.log(twins[["l0", key]].astype(float))
    return float(np.exp(np.interp(np.log(l0), known["l0"], known[key], left=np.nan, right=np.nan)))


def interval(values: pd.Series) -> float:
    """Half the width of the 95% interval of a mean, by Student's t; NaN of a single value."""
    values = values.dropna()
    return float(stats.sem(values) * stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) if len(values) > 1 else np.nan


def worth(sweep: pd.DataFrame, changes: pd.DataFrame) -> pd.DataFrame:
    """Say which variants are worth their price, in the means over the seeds.

    "correlation" and "cosine": the cut is reached within the room for FVU, and with no more dead features than the
    twin's number varies by from seed to seed. "both": both cuts, for a share of the twin's FVU.
    """
    mean = changes.groupby(level="variant", sort=False).mean()
    alive = mean["dead_features"] <= np.nan_to_num(sweep.loc[TWIN]["dead_features"].std())
    correlation = mean["top_correlation_share"] <= -CORRELATION_CUT
    cosine = mean["max_decoder_cosine_share"] <= -COSINE_CUT
    affordable = alive & (mean["fvu"] <= FVU_ROOM)
    both = alive & correlation & cosine & (mean["fvu_share"] <= FVU_SHARE)
    return pd.DataFrame({"correlation": affordable & correlation, "cosine": affordable & cosine, "both": both})


def gains(synthetic: pd.DataFrame, recipe: str) -> pd.DataFrame:
    """Compare our SAEs on synthetic data with their twins, one row a variant, world and seed.

    "fvu_share" is relative to the twin. Absorption is NaN in worlds without a hierarchy.
    """
    ours = synthetic.xs((recipe, "scores"), level=("recipe", "source"))
    ours = ours.reindex(columns=[*SCORES, "precision", "l0", "fvu", "absorption"])
    twin = ours.xs(TWIN, level="variant").reindex(ours.index.droplevel("variant"))
    found = ours - twin.to_numpy()
    found["fvu_share"] = found["fvu"] / twin["fvu"].to_numpy()
    return found[~is_twin(found.index.get_level_values("variant"))]


def consistent(values: pd.Series, tests: int) -> bool:
    """Say whether a gain has one sign more often than chance: a sign test of each direction, Bonferroni over tests."""
    signs = np.sign(values[values != 0])
    most = max((signs > 0).sum(), (signs < 0).sum())
    return len(signs) > 0 and bool(stats.binomtest(int(most), len(signs), alternative="greater").pvalue < LEVEL / tests)


def changed_tests(found: pd.DataFrame) -> int:
    """Count the sign tests of all variants and scores, in both directions."""
    return 2 * len(SCORES) * found.index.get_level_values("variant").nunique()
