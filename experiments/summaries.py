"""Records of single seeds to means with their spread, and to differences from the twin of the same seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TWIN = "none"  # the variant without penalty, which every other one of its sweep is compared with
NAMES = {"topk": "TopK", "relu": "ReLU + L1", "batchtopk": "BatchTopK"}  # of recipes and of the sweeps that have them


@dataclass(frozen=True)
class Figure:
    """A figure over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def agrees(self, sign: float) -> bool:
        """Whether every seed has this sign."""
        return all(value * sign > 0 for value in self.values)

    def text(self, digits: int = 3) -> str:
        """Mean ± standard deviation, such as "0.083 ± 0.001"."""
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"

    def signed(self, digits: int = 3) -> str:
        """The same with its sign, for differences."""
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:+.{digits}f}{spread}"

    def percent(self) -> str:
        """A signed share in percent."""
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.mean:+.1f}{spread}%"


@dataclass(frozen=True)
class Summary:
    """All seeds of a variant at a layer."""

    sweep: str
    variant: str
    layer: int
    by_seed: dict[int, dict[str, Any]]  # records

    def figure(self, key: str) -> Figure | None:
        """A figure of the evaluation over the seeds, None if no record has it."""
        found = [value_of(record, key) for _, record in sorted(self.by_seed.items())]
        values = tuple(value for value in found if value is not None)
        return Figure(values) if values else None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the training."""
        arguments: dict[str, Any] = next(iter(self.by_seed.values()))["arguments"]
        return arguments


def is_twin(variant: str) -> bool:
    """Whether a variant has no penalty; besides the twin proper there are some of other sparsities."""
    return variant == TWIN or variant.startswith(f"{TWIN}-")


def twin_among(summaries: Iterable[Summary]) -> Summary | None:
    """The twin proper; None if it is not there."""
    return next((summary for summary in summaries if summary.variant == TWIN), None)


def value_of(record: Mapping[str, Any], key: str) -> float | None:
    """A figure of a record by name: of its evaluation, or with a dot of another part, "training.fvu"."""
    part, _, name = key.rpartition(".")
    block: Any = record
    for step in (part or "evaluation").split("."):
        block = block.get(step) or {}
    value = block.get(name)
    return None if value is None or not math.isfinite(value) else float(value)


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int, str], Summary]:
    """Summaries by sweep, layer and variant."""
    groups: dict[tuple[str, int, str], dict[int, dict[str, Any]]] = {}
    for record in records:
        key = (record["sweep"], record["layer"], record["variant"])
        groups.setdefault(key, {})[record["seed"]] = dict(record)
    return {key: Summary(key[0], key[2], key[1], seeds) for key, seeds in groups.items()}


def paired(summary: Summary, twin: Summary, key: str, *, relative: bool = False) -> Figure | None:
    """Differences of a figure from the twin's, seed by seed; relative ones as shares of the twin's."""
    values = []
    for seed in sorted(summary.by_seed.keys() & twin.by_seed.keys()):
        own, other = value_of(summary.by_seed[seed], key), value_of(twin.by_seed[seed], key)
        if own is not None and other is not None and (other != 0 or not relative):
            values.append((own - other) / other if relative else own - other)
    return Figure(tuple(values)) if values else None


def at_equal_l0(
    summary: Summary, twins: Sequence[Summary], key: str = "fvu", *, relative: bool = False
) -> Figure | None:
    """What a figure of each seed exceeds that of twins by at the same L0.

    Between twins of several L0 the logarithm of a figure is taken as linear in that of L0: the FVU falls ever more
    slowly, so that straight lines would lie above it. Seeds whose L0 lies outside that of the twins are left out:
    nothing is extrapolated. Nor do twins count whose figure is not positive.
    """
    values = []
    for seed, record in sorted(summary.by_seed.items()):
        points = sorted(
            (math.log(l0), math.log(figure))
            for twin in twins
            if seed in twin.by_seed
            and (l0 := value_of(twin.by_seed[seed], "l0"))
            and (figure := value_of(twin.by_seed[seed], key) or 0.0) > 0
        )
        own, l0 = value_of(record, key), value_of(record, "l0")
        if own is None or not l0:
            continue
        expected = interpolate(points, math.log(l0))
        if expected is not None:
            values.append(own / math.exp(expected) - 1 if relative else own - math.exp(expected))
    return Figure(tuple(values)) if values else None


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Between neighbouring points (sorted by x); None outside of them."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None
