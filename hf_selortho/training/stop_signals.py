"""SIGTERM and Ctrl-C as a wish: the step is finished, a checkpoint written, and the command to go on is said."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopSignals:
    """`with StopSignals() as signals:` the first SIGTERM or Ctrl-C is only noted; a second Ctrl-C ends the process.

    It ends by the operating system's hand, whatever the process is busy with. In threads other than the main one, where
    Python sets no handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # the signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _NAMES}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.received is None:
            self.received = number
            words = (
                f"\n{_NAMES[signal.Signals(number)]}: finishing the step and writing a checkpoint; "
                f"Ctrl-C or kill -INT {os.getpid()} stops at once\n"
            )
            with suppress(OSError):  # nobody may be listening any more
                os.write(2, words.encode())  # sys.stderr may be in the middle of a line of somebody else
