"""Make a picture of a part of an SAE's page: of the features that it opens on, or of an attribution graph.

python -m experiments.page_picture runs/demo docs/images/gallery.png
python -m experiments.page_picture runs/tc docs/images/graph.png --address view=graph --part .so-graph

It needs Playwright and a Chromium, found on the path or named by the variable CHROMIUM.
"""

import argparse
import os
import shutil
from pathlib import Path

from hf_selortho.browser.address import MAIN
from hf_selortho.browser.catalog import open_catalog
from hf_selortho.browser.graph_view import open_graphs
from hf_selortho.browser.live_model import LiveModel
from hf_selortho.browser.page import HEAD, STYLE, Page, theme
from hf_selortho.browser.views import Views
from hf_selortho.errors import SelOrthoError
from hf_selortho.utils.command_line import run_script


def main() -> None:
    """Serve the page to a browser of its own and keep what it shows of a part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sae", help="folder of an SAE or of a run with a feature index, or owner/name of the Hub")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--address", default="", help="of the view, what follows ? in the browser; default: the start")
    parser.add_argument("--part", default=".so-gallery", help="CSS selector of the part")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright  # of the extra `test`

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SelOrthoError("no Chromium: install one, or set CHROMIUM to the path of one")
    catalog = open_catalog(arguments.sae, None)
    graphs = open_graphs(arguments.sae, None, catalog[MAIN])
    blocks = Page(Views(catalog, LiveModel(catalog, "none"), graphs=graphs)).build()
    _, url, _ = blocks.launch(theme=theme(), css=STYLE, head=HEAD, quiet=True, prevent_thread_lock=True, ssr_mode=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, device_scale_factor=1.5)
        page.goto(f"{url}?{arguments.address}")
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        page.locator(arguments.part).first.screenshot(path=arguments.picture, timeout=60_000)
        browser.close()
    blocks.close()


if __name__ == "__main__":
    run_script(main)
