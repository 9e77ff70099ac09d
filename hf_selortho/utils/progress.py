"""A progress bar whose end is not known exactly."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


class EstimatedBar(tqdm):
    """A progress bar whose total is an estimate: it says "about", and moves its end rather than overrun it."""

    total: float

    def __init__(self, **options: Any) -> None:
        shown = "{l_bar}{bar}| {n_fmt} of about {total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        super().__init__(**{"bar_format": shown, **options})

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
