"""Progress bars, and the time that is left of a whole command that shows several of them one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


class _Whole:
    """The stages of a command: what each costs, in any unit, and what is done."""

    def __init__(self) -> None:
        self.costs: dict[str, float] = {}
        self.names: list[str] = []
        self.cost_done = self.seconds_done = 0.0

    def expect(self, costs: Mapping[str, float]) -> None:
        self.costs = {name: cost for name, cost in costs.items() if cost > 0}
        self.names = list(self.costs)

    def finish(self, name: str, seconds: float) -> None:
        self.cost_done += self.costs.pop(name, 0.0)
        self.seconds_done += seconds

    def seconds_left(self, name: str, share_done: float, seconds: float) -> float | None:
        """Estimate the seconds to the end of all stages; None where nothing is known yet."""
        done = self.cost_done + share_done * self.costs[name]
        left = sum(self.costs.values()) - share_done * self.costs[name]
        return left * (self.seconds_done + seconds) / done if done else None


_whole: list[_Whole] = []  # of the command that runs, if it has said what its stages are


@contextmanager
def stages() -> Iterator[None]:
    """Let the bars of a block say which stage of how many they show, and about how long all of them will still take.

    What stages there are is said within it, by [`expect_stages`].
    """
    _whole.append(_Whole())
    try:
        yield
    finally:
        _whole.pop()


def expect_stages(costs: Mapping[str, float]) -> None:
    """Say what the stages of the command that runs are; nothing happens outside of [`stages`].

    Args:
        costs: of the stages by the description of their bar, in order and in any common unit, such as operations;
            stages of no cost do not come.
    """
    if _whole:
        _whole[-1].expect(costs)


class Bar(tqdm):
    """A progress bar of one stage of a command ([`stages`])."""

    total: float
    _of = "/"

    def __init__(self, desc: str, **options: Any) -> None:
        whole = _whole[-1] if _whole else None
        self._stage, self._whole = desc, whole if whole and desc in whole.costs else None
        if self._whole:
            desc = f"{self._whole.names.index(desc) + 1}/{len(self._whole.names)} {desc}"
        times = "[{elapsed}<{remaining}{whole}, {rate_fmt}{postfix}]"
        shown = f"{{l_bar}}{{bar}}| {{n_fmt}}{self._of}{{total_fmt}} {times}"
        super().__init__(**{"bar_format": shown, "desc": desc, **options})

    @property
    def format_dict(self) -> dict[str, Any]:
        """What `bar_format` may name."""
        values: dict[str, Any] = super().format_dict
        left = None
        if self._whole and self.total and values["elapsed"]:
            left = self._whole.seconds_left(self._stage, values["n"] / self.total, values["elapsed"])
        values["whole"] = "" if left is None else f", all in about {tqdm.format_interval(left)}"
        return values

    def close(self) -> None:
        """Leave the bar as it is, and count its stage as done."""
        if self._whole and not self.disable:
            self._whole.finish(self._stage, super().format_dict["elapsed"])
            self._whole = None
        super().close()


class EstimatedBar(Bar):
    """A progress bar whose total is an estimate: it says "about", and moves its end rather than overrun it."""

    _of = " of about "

    def update(self, n: float | None = 1) -> bool | None:
        """Add to what is done."""
        if not self.disable:
            self.total = max(self.total, self.n + (n or 0))
        return super().update(n)

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        """Close the bar, at its end unless an error has ended the work."""
        if kind is None and not self.disable:
            self.total = self.n
        super().__exit__(kind, value, traceback)
