"""Measure the Space as a visitor meets it: real server, real browser; needs the extras `space` and `test` and Chromium.

python scripts/benchmark_space.py runs/demo
python scripts/benchmark_space.py --synthetic_features 65536   # an index of that many features, without language model
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import psutil  # type: ignore[import-untyped]

from hf_selortho import SelOrthoConfig, SelOrthoError
from hf_selortho.features.index import FeatureIndex
from hf_selortho.features.index_writer import INDEX, IndexWriter
from hf_selortho.features.records import BINS, FeatureContext, FeatureRecord, Neighbour, PairRecord, TokenEffect
from hf_selortho.training.arguments import OneLineParser, argument
from hf_selortho.utils.command_line import run_script
from hf_selortho.utils.files import write_json

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
SENTENCE = " ".join(["The function returns a list of the names in the scope"] * 4)[:190]  # some 40 tokens
READY = (
    "() => !document.body.hasAttribute('data-busy') && document.body.dataset.view && "
    "document.querySelector('#so-view-' + document.body.dataset.view + ' [data-address]')"
)
WORDS = (" the", " function", " returns", " list", ".", "\n", " import", " <b>", " é", " of", " a", " name")


@dataclass
class SpaceArguments:
    """What is measured."""

    synthetic_features: int | None = argument(None, "Measure an index of so many made-up features instead of an SAE.")
    rounds: int = argument(20, "How often each figure is taken; the median counts.")
    chromium: str | None = argument(None, "The browser; default: chromium on the PATH.")
    output: str | None = argument(None, "JSON file to write the figures to.")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve, look, print a table."""
    groups: list[Any] = [SpaceArguments]
    parser = OneLineParser(groups, allow_abbrev=False)
    parser.add_argument("sae", nargs="?", help="Folder or Hub id of an SAE with a feature index.")
    arguments, rest = parser.parse_args_into_dataclasses(list(sys.argv[1:] if argv is None else argv))
    if (rest.sae is None) == (arguments.synthetic_features is None):
        parser.error("expected an SAE or --synthetic_features, and not both")
    browser = arguments.chromium or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SelOrthoError("no Chromium on the PATH: install one, or pass --chromium")
    with tempfile.TemporaryDirectory(prefix="hf_selortho-space-") as scratch:
        given = [rest.sae] if rest.sae else [str(synthetic_sae(Path(scratch), arguments.synthetic_features))]
        options = [] if rest.sae else ["--lm", "none"]
        figures = measure([*given, *options], arguments.rounds, browser, Path(scratch))
    for name, value in figures.items():
        sys.stdout.write(f"{name:44} {value:10.3f}\n")
    if arguments.output:
        write_json(Path(arguments.output), figures)


def measure(sae: list[str], rounds: int, browser: str, scratch: Path) -> dict[str, float]:
    """Median seconds of each thing that a visitor does, and the server's memory in GB."""
    from playwright.sync_api import sync_playwright

    place, *options = sae
    found = FeatureIndex.open(place if Path(place, INDEX).is_dir() else next(iter(_members(place)), place))
    features = found.firing_features()[:: max(1, len(found.firing_features()) // (rounds + 1))]
    live = "--lm" not in options
    with served(place, options, scratch / "app.log") as (url, process), sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=browser, args=list(CHROMIUM))
        figures = {
            "page usable, new visitor (s)": median(rounds, lambda turn: visit(chrome, f"{url}/?view=feature&id=0")),
        }
        page = chrome.new_page()
        page.goto(f"{url}/?view=feature&id=0")
        page.wait_for_function(READY)
        figures["a feature opens (s)"] = median(
            rounds, lambda turn: open_in(page, f"?view=feature&id={features[turn]}")
        )
        if found.pairs:
            pairs = found.pair_table.slice(0, rounds).to_pylist()
            address = [f"?view=pair&a={row['a']}&b={row['b']}" for row in pairs]
            figures["a pair opens (s)"] = median(min(rounds, len(address)), lambda turn: open_in(page, address[turn]))
        if live:
            open_in(page, f"?q={quote('Until the language model is there.')}")
            figures["a sentence of 40 tokens (s)"] = median(
                rounds, lambda turn: open_in(page, f"?q={quote(f'{turn} {SENTENCE}')}")
            )
        figures["server's memory (GB)"] = psutil.Process(process.pid).memory_info().rss / 1e9
        chrome.close()
    return figures


def visit(chrome: Any, address: str) -> float:
    """Seconds until a visitor without a cache can use the page, since the server's first byte."""
    context = chrome.new_context()
    page = context.new_page()
    page.goto(address, wait_until="commit")
    started = time.perf_counter()
    page.wait_for_function(READY)
    seconds = time.perf_counter() - started
    context.close()
    return seconds


def open_in(page: Any, query: str) -> float:
    """Seconds from a click to the view, within the page."""
    script = """async (query) => {
        const started = performance.now();
        window.selortho.go(query);
        await new Promise((done) => {
            const look = () => (document.body.hasAttribute("data-busy") ? setTimeout(look, 5) : done());
            look();
        });
        return (performance.now() - started) / 1000;
    }"""
    return float(page.evaluate(script, query))


def median(rounds: int, once: Callable[[int], float]) -> float:
    """Median over the rounds, after one that does not count."""
    once(0)
    return statistics.median(once(turn) for turn in range(rounds))


@contextmanager
def served(sae: str, options: list[str], log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The page's address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "spaces_app/app.py"), "--sae", sae, *options, "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        while True:
            if process.poll() is not None:
                raise SelOrthoError(f"the page ended: {log.read_text(errors='replace')[-500:]}")
            try:
                with urlopen(url, timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield url, process
    finally:
        process.terminate()
        process.wait(30)


def synthetic_sae(folder: Path, features: int) -> Path:
    """The config and an index of made-up records, of the size that real ones have."""
    SelOrthoConfig(d_in=2304, d_sae=features, layer=12, lm_name="org/lm").save_pretrained(folder)
    rng = np.random.default_rng(0)
    with IndexWriter(folder / INDEX) as writer:
        writer.add_features(_record(number, features, rng) for number in range(features))
        writer.add_pairs(_pair(number) for number in range(min(5000, features - 1)))
        writer.facts = {name: {} for name in ("sae", "lm", "text", "features", "pairs")}
    return folder


def _record(number: int, features: int, rng: np.random.Generator) -> FeatureRecord:
    effects = [TokenEffect(int(token), WORDS[token % len(WORDS)], 1.5) for token in rng.integers(0, 200_000, 10)]
    near = [Neighbour(int(other), 0.3, 0.2, 17) for other in rng.integers(0, features, 10)]
    return FeatureRecord(
        number, f"label {number}", "tokens", 1000, 0.001, 9.0, 2.0, [int(n) for n in rng.integers(0, 50, BINS)],
        effects, effects, near, near, [_context(kind, rng) for kind in ["top"] * 10 + ["sample"] * 20],
    )  # fmt: skip


def _context(kind: str, rng: np.random.Generator) -> FeatureContext:
    tokens = [WORDS[word] for word in rng.integers(0, len(WORDS), 48)]
    acts = np.where(rng.random(48) < 0.1, rng.random(48) * 9, 0.0)
    return FeatureContext(kind, int(rng.integers(0, 10**6)), 0, 31, 9.0, 1.0, tokens, [float(a) for a in acts])


def _pair(number: int) -> PairRecord:
    return PairRecord(number, number + 1, "nested", 0.5, 0.4, None, None, None, None, None, 0.2, None, 100, 90, 50)


def _members(place: str) -> Iterator[str]:
    yield from (str(path.parent) for path in sorted(Path(place).glob(f"layer_*/{INDEX}")))


if __name__ == "__main__":
    run_script(main)
