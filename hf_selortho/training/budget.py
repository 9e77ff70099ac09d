"""Steering of the penalty's coefficient, so that it holds a budget: the "adaptive" future work that the paper names."""

from __future__ import annotations

import bisect
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from ..errors import SelOrthoError
from .run_folder import METRICS_LOG

LOWEST, HIGHEST = 1e-6, 1e3  # of a coefficient
MEDIAN_ROWS = 9  # logged steps whose median stands for the reference's FVU, against the noise of single batches


class GradientShare:
    """Holds the penalty's gradient at a fixed share of the reconstruction's: `|g_penalty| = share |g_reconstruction|`.

    The coefficient moves in log space towards the one that would have met the share, by `rate` of the way.
    """

    def __init__(
        self, initial: float, share: float, rate: float = 0.2, low: float = LOWEST, high: float = HIGHEST
    ) -> None:
        self.coefficient, self.share, self.rate = initial, share, rate
        self.low, self.high = low, high

    def update(self, penalty_norm: float, reconstruction_norm: float) -> None:
        """Look at gradient norms measured with the current coefficient; 0, NaN and infinity tell nothing."""
        if not (0 < penalty_norm < math.inf and 0 < reconstruction_norm < math.inf):
            return
        distance = math.log(self.share) + math.log(reconstruction_norm) - math.log(penalty_norm)
        self.coefficient = _moved(self.coefficient, self.rate * distance, self.low, self.high)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a [`state_dict`]."""
        self.coefficient = state["coefficient"]


class FVUBudget:
    """Holds the FVU at most `excess` above what reconstruction alone reaches: `fvu / reference(step) = 1 + excess`.

    The log of the coefficient moves in proportion to the room left, in units of the excess, at most `rate` a step; the
    ratio is smoothed over steps, as single batches differ by more than a budget of 1%.
    """

    def __init__(
        self,
        initial: float,
        excess: float,
        reference: Callable[[int], float | None],
        rate: float = 0.02,
        smoothing: float = 0.9,
        low: float = LOWEST,
        high: float = HIGHEST,
    ) -> None:
        self.coefficient, self.excess, self.reference = initial, excess, reference
        self.rate, self.smoothing = rate, smoothing
        self.low, self.high = low, high
        self.ratio: float | None = None

    def update(self, step: int, fvu: float) -> None:
        """Look at the FVU of a training step."""
        alone = self.reference(step)
        if alone is None or not (alone > 0 and math.isfinite(fvu)):
            return
        ratio = fvu / alone
        self.ratio = ratio if self.ratio is None else self.smoothing * self.ratio + (1 - self.smoothing) * ratio
        room = (1 + self.excess - self.ratio) / self.excess
        self.coefficient = _moved(self.coefficient, self.rate * max(-1.0, min(1.0, room)), self.low, self.high)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coefficient": self.coefficient} | ({} if self.ratio is None else {"ratio": self.ratio})

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a [`state_dict`]."""
        self.coefficient, self.ratio = state["coefficient"], state.get("ratio")


def read_reference(path: str | Path) -> Callable[[int], float | None]:
    """FVU by step of a run without penalty, from its metrics.jsonl (or the run's folder).

    A running median over logged steps, interpolated between them and constant beyond the first and the last.

    Raises:
        SelOrthoError: there is no such file, it has no FVU, or a line of it is damaged (names it).
    """
    file = Path(path) / METRICS_LOG if Path(path).is_dir() else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SelOrthoError(
            f"--ortho_reference {path}: expected the folder of a run without penalty, with its {METRICS_LOG} ({error})"
        ) from error
    rows = [_step_and_fvu(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    measured = sorted(row for row in rows if row is not None and math.isfinite(row[1]))
    if not measured:
        raise SelOrthoError(f"{file} holds no fvu by step: expected the {METRICS_LOG} of a training run")
    steps = [step for step, _ in measured]
    half = MEDIAN_ROWS // 2
    fvus = [statistics.median(f for _, f in measured[max(0, k - half) : k + half + 1]) for k in range(len(measured))]

    def reference(step: int) -> float:
        right = bisect.bisect_left(steps, step)
        if right == 0 or right == len(steps):
            return fvus[min(right, len(steps) - 1)]
        share = (step - steps[right - 1]) / (steps[right] - steps[right - 1])
        return fvus[right - 1] + share * (fvus[right] - fvus[right - 1])

    return reference


def _step_and_fvu(file: Path, number: int, line: str) -> tuple[int, float] | None:
    try:
        row = json.loads(line)
        return None if row.get("fvu") is None else (int(row["step"]), float(row["fvu"]))
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise SelOrthoError(f"{file}, line {number} is damaged ({error}); take the file of a complete run") from error


def _moved(coefficient: float, by: float, low: float, high: float) -> float:
    return min(high, max(low, coefficient * math.exp(by)))
