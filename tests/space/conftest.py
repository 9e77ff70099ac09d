"""The browser that looks at pages."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.space.served import CHROMIUM, chromium, keep


@pytest.fixture(scope="module")
def browser() -> Generator[Browser, None, None]:
    expect.set_options(timeout=60_000)  # beside other tests, a machine may be slow
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM)
        yield running
        running.close()


@pytest.fixture
def page(browser, request) -> Generator[Page, None, None]:
    """A fresh window; an error of its script fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    window, errors = context.new_page(), []
    window.set_default_timeout(60_000)
    window.on("pageerror", lambda error: errors.append(str(error)))
    yield window
    keep(window, request.node.name)
    context.close()
    assert errors == []
