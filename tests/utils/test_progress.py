"""Bars of a command with several stages."""

from __future__ import annotations

import io
import re
import time

from hf_selortho.utils.progress import Bar, EstimatedBar, expect_stages, stages


def last_shown(bar_of, **options) -> str:
    screen = io.StringIO()
    with bar_of(file=screen, **options) as bar:
        for _ in range(4):
            time.sleep(0.02)
            bar.update()
            bar.refresh()
    return screen.getvalue().strip().split("\r")[-2]  # before it is closed


def test_bars_say_their_stage_and_how_long_all_of_them_take() -> None:
    with stages():
        expect_stages({"reading": 1.0, "never": 0.0, "training": 98.0, "measuring": 1.0})
        first = last_shown(Bar, desc="reading", total=4)
        minutes, seconds = map(int, re.search(r"^1/3 reading: 100%.* 4/4 .*all in about (\d\d):(\d\d)", first).groups())
        assert 3 < 60 * minutes + seconds < 60, "99 times as long as the 0.1 seconds so far"
        second = last_shown(EstimatedBar, desc="training", total=8)
        assert re.search(r"^2/3 training: +50%.* 4 of about 8 .*all in about 00:0[01]", second)
        assert last_shown(Bar, desc="of another library", total=4).startswith("of another library")
    assert last_shown(Bar, desc="reading", total=4).startswith("reading: 100%")
