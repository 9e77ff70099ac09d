"""Variants against their twin at equal L0: what each buys, what it costs, and which of them is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .summaries import Figure, Summary, at_equal_l0, is_twin, paired, twin_among

FVU_ROOM = 0.004  # absolute, above the twin's at equal L0
RELATIVE_ROOM = 0.01  # of the twin's FVU, for both cuts at once
AS_THEY_ARE = ("dead_features", "absorption_rate")  # often zero, which no power law goes through
CORRELATION_CUT, COSINE_CUT = 0.25, 0.40  # shares of the twin's top correlation and maximum decoder cosine
BOUGHT = {"correlation": "mean of the top 0.1% correlations", "cosine": "mean maximum decoder cosine"}  # by attribute


@dataclass(frozen=True)
class Comparison:
    """A variant and its twin, the same seeds of both."""

    summary: Summary
    twin: Summary
    fvu_excess: Figure  # at equal L0: by interpolation between twins where the L0 is not fixed
    relative_excess: Figure  # as a share of the twin's FVU
    correlation: Figure  # relative difference of the mean of the top correlations, at equal L0
    cosine: Figure  # relative difference of the mean maximum decoder cosine, at equal L0
    dead: Figure  # difference in dead features
    recovered: Figure | None = None  # difference in the loss recovered, at equal L0
    twins: tuple[Summary, ...] = ()  # of other L0, that are interpolated; empty where the L0 is fixed

    def at_twins_l0(self, key: str) -> Figure | None:
        """What a figure would be at the twin's L0, by its difference there; those of [`AS_THEY_ARE`] are the own ones.

        None if it is not known.
        """
        if not self.twins or key in AS_THEY_ARE:
            return self.summary.figure(key)
        twin, change = self.twin.figure(key), at_equal_l0(self.summary, self.twins, key)
        return None if twin is None or change is None else Figure(tuple(twin.mean + value for value in change.values))

    @property
    def no_more_dead(self) -> bool:
        """Whether the difference in dead features is at most what the twin's number varies by from seed to seed."""
        twin = self.twin.figure("dead_features")
        return self.dead.mean <= ((twin.std if twin is not None else None) or 0.0)

    @property
    def within_room(self) -> bool:
        """At most [`FVU_ROOM`] more FVU at equal L0, in the mean over the seeds."""
        return self.fvu_excess.mean <= FVU_ROOM

    @property
    def affordable(self) -> bool:
        """Within the room, and no more dead features."""
        return self.within_room and self.no_more_dead

    @property
    def cuts_correlation(self) -> bool:
        """By as much as [`CORRELATION_CUT`], in the mean."""
        return self.correlation.mean <= -CORRELATION_CUT

    @property
    def cuts_cosine(self) -> bool:
        """By as much as [`COSINE_CUT`], in the mean."""
        return self.cosine.mean <= -COSINE_CUT

    @property
    def both(self) -> bool:
        """Both cuts for at most [`RELATIVE_ROOM`] of the FVU."""
        cheap = self.relative_excess.mean <= RELATIVE_ROOM and self.no_more_dead
        return cheap and self.cuts_correlation and self.cuts_cosine


def comparisons(summaries: Sequence[Summary]) -> list[Comparison]:
    """Of every variant of a sweep at one layer with its twin; variants whose L0 no twins enclose are left out."""
    twin = twin_among(summaries)
    if twin is None:
        return []
    twins = [summary for summary in summaries if is_twin(summary.variant)]
    fixed = twin.settings.get("activation") in ("topk", "batchtopk")
    found = []
    for summary in summaries:
        if is_twin(summary.variant):
            continue

        def against(key: str, relative: bool = True, own: Summary = summary) -> Figure | None:
            return (
                paired(own, twin, key, relative=relative) if fixed else at_equal_l0(own, twins, key, relative=relative)
            )

        figures = [
            against("fvu", relative=False), against("fvu"), against("top_correlation"), against("max_decoder_cosine"),
            paired(summary, twin, "dead_features"),
        ]  # fmt: skip
        known = [figure for figure in figures if figure is not None]
        if len(known) == len(figures):
            excess, share, correlation, cosine, dead = known
            recovered = against("loss_recovered", relative=False)
            interpolated = () if fixed else tuple(twins)
            found.append(Comparison(summary, twin, excess, share, correlation, cosine, dead, recovered, interpolated))
    return found


def left_out(summaries: Sequence[Summary], found: Sequence[Comparison]) -> list[str]:
    """Variants that could not be compared."""
    compared = {one.summary.variant for one in found}
    return [s.variant for s in summaries if not is_twin(s.variant) and s.variant not in compared]


def best_by(found: Sequence[Comparison], key: str) -> Comparison | None:
    """The affordable variant that cuts "correlation" or "cosine" most."""
    allowed = [one for one in found if one.affordable]
    return min(allowed, key=lambda one: getattr(one, key).mean, default=None)


def cheapest_by(found: Sequence[Comparison], key: str) -> Comparison | None:
    """The cheapest affordable variant that reaches the cut; where none does, the one that cuts most."""
    reach = [one for one in found if one.affordable and getattr(one, f"cuts_{key}")]
    return min(reach, key=lambda one: one.fvu_excess.mean, default=best_by(found, key))


def best_of_both(found: Sequence[Comparison]) -> Comparison | None:
    """Among the variants that buy both cuts, the one whose cuts are largest together."""
    return min((one for one in found if one.both), key=lambda one: one.correlation.mean + one.cosine.mean, default=None)


def nearest_to_both(found: Sequence[Comparison]) -> Comparison | None:
    """Among the variants without more dead features, the one that misses price, correlation or cosine least.

    What is missed counts as a share of what is asked, and the worst of the three decides.
    """

    def missed(one: Comparison) -> float:
        return max(
            one.relative_excess.mean / RELATIVE_ROOM - 1,
            1 + one.correlation.mean / CORRELATION_CUT,
            1 + one.cosine.mean / COSINE_CUT,
        )

    return min((one for one in found if one.no_more_dead), key=missed, default=None)
