"""Long commands that a signal ends in the middle: repeated as they were typed, they go on or name what makes them.

The processes are real and end by the signal. They are forked from one that has imported everything; each counts its
forward passes of the language model and what it flushes to the disk, and sends itself the signal at one of these.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hf_selortho.commands.main import main
from hf_selortho.language_models.capture import ActivationCapture

MOMENTS = "moments.txt"  # how many there were


class Outcome(NamedTuple):
    """How a process ended."""

    code: int  # negative: the signal that ended it
    words: str


def run_until(argv: list[str], folder: Path, number: int, moment: int) -> None:
    """Run a command line in a folder, in this process, up to that moment (0: to its end)."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    passed = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal passed
            passed += 1
            if passed == moment:
                os.kill(os.getpid(), number)
            return function(*args, **options)

        return call

    os.fsync, ActivationCapture.hidden_states = counted(os.fsync), counted(ActivationCapture.hidden_states)
    sys.argv = ["selortho", *argv]
    main()
    Path(MOMENTS).write_text(str(passed))


@pytest.fixture(scope="module")
def run() -> Callable[..., Outcome]:
    """`run(argv, folder, number, moment)`: [`run_until`] in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [__name__, *(f"hf_selortho.commands.{name}" for name in ("train", "cache", "index", "evaluate"))]
    )

    def start(argv: list[str], folder: Path, number: int = signal.SIGKILL, moment: int = 0) -> Outcome:
        process = context.Process(target=run_until, args=(argv, folder, int(number), moment))
        process.start()
        process.join(120)
        assert process.exitcode is not None, f"{argv} hangs"
        return Outcome(process.exitcode, (folder / "log.txt").read_text())

    return start


@pytest.fixture(scope="module")
def command(tiny_lm_dir, sample_text_files, tmp_path_factory) -> Callable[[str], list[str]]:
    """`command("index")`: a command line of seconds, which writes to the folder `run`."""
    texts = tmp_path_factory.mktemp("texts") / "texts.csv"
    texts.write_text("".join(sample_text_files.csv.read_text().splitlines(keepends=True)[:120]))
    text = ["--model", str(tiny_lm_dir("llama")), "--dataset", str(texts), "--lm_dtype", "float32", "--cpu"]
    short = ["--context_length", "32", "--eval_samples", "8", "--output_dir", "run"]
    training = [
        *("train", *text, *short, "--layer", "1", "--twin", "--d_sae", "64", "--batch_size", "64", "--max_steps", "6"),
        *("--buffer_contexts", "16", "--refresh_every", "2", "--held_out_fraction", "0.3", "--eval_ce_samples", "2"),
        *("--checkpoint_every", "2", "--pair_fraction", "0.01"),
    ]
    probes = ["--label_column", "label", "--probing_texts", "30", "--eval_samples", "8", "--output", "run/found.json"]
    commands = {
        "cache": ["cache", *text, *short, "--layers", "1", "--shard_tokens", "300"],
        "train": training,
        "index": ["index", "run", "--tokens", "300", "--cpu", "--lm_dtype", "float32", "--concepts", "none"],
        "evaluate": ["evaluate", "run/layer_1", "--cpu", "--lm_dtype", "float32", *probes],
    }
    return lambda name: commands[name]


@pytest.fixture(scope="module")
def whole(run, command, tmp_path_factory) -> Callable[[str], Path]:
    """`whole("index")`: folder in which that command was never interrupted."""

    @functools.cache
    def build(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "whole"
        prepare(folder, name, build)
        outcome = run(command(name), folder)
        assert outcome.code == 0, outcome.words
        return folder

    return build


def prepare(folder: Path, name: str, whole: Callable[[str], Path]) -> None:
    """Make the folder that a command starts in: empty, or with the run that it reads."""
    if name in ("index", "evaluate"):
        shutil.copytree(whole("train"), folder)
    else:
        folder.mkdir()


def contents(folder: Path) -> dict[str, str]:
    """Hashes of the files of a run, but for those that say when and how fast."""
    timed = re.compile(r"run\.json|README\.md|metrics\.json|timings\.jsonl|.*\.png|\.lock|.*checkpoints/.*|pictures/.*")
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    named = {path.relative_to(folder / "run").as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in named.items()
        if not timed.fullmatch(name) and not timed.fullmatch(path.name)
    }


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *((name, signal.SIGKILL) for name in ("cache", "train", "index", "evaluate")),
        *(("cache", signal.SIGINT), ("index", signal.SIGINT)),
        pytest.param("train", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_interrupted_again_and_again_it_ends_with_the_same_files(name, number, run, command, whole, tmp_path) -> None:
    expected, folder = whole(name), tmp_path / "interrupted"
    moments = int((expected / MOMENTS).read_text())
    prepare(folder, name, whole)
    argv, ends = command(name), list[int]()
    for share in (0.3, 0.8, None):  # of the moments of the whole command; the last one is left alone
        moment = 0 if share is None else max(1, round(share * moments))
        outcome = run(argv, folder, number, moment)
        if outcome.code == 2:  # it says what makes it go on
            argv = [*argv, *re.findall(r"go on with (--\w+) (\w+)", outcome.words)[0]]
            outcome = run(argv, folder, number, moment)
        assert "Traceback" not in outcome.words, outcome.words
        ends.append(outcome.code)
    assert ends[0] in (-number, 128 + number) and ends[-1] == 0, (ends, outcome.words)
    assert contents(folder) == contents(expected)
    assert not [path for path in (folder / "run").rglob("*") if "tmp" in path.name or "partial" in path.name]


def test_what_is_done_is_kept_where_the_settings_are_the_same(run, command, whole, tmp_path) -> None:
    folder = tmp_path / "interrupted"
    shutil.copytree(whole("train"), folder)
    argv = command("index")
    one = [argv[0], "run/layer_1", *argv[2:]]
    assert run(one, folder).code == 0
    built = (folder / "run/layer_1/feature_index/index.json").stat().st_mtime_ns

    outcome = run([*argv, "--seed", "3"], folder)
    assert outcome.code == 2 and "settings.seed 0 -> 3" in outcome.words and "--overwrite" in outcome.words
    assert not (folder / "run/layer_1_twin/feature_index").exists()  # nothing is built then
    outcome = run(argv, folder)
    assert outcome.code == 0 and outcome.words.count("kept, as it was built with these settings") == 1
    assert (folder / "run/layer_1/feature_index/index.json").stat().st_mtime_ns == built
    (folder / "run/layer_1/feature_index/features.parquet").write_bytes(b"PAR1")
    outcome = run(argv, folder)
    assert outcome.code == 2 and "--overwrite replaces it" in outcome.words
    outcome = run([*argv, "--overwrite"], folder)
    assert outcome.code == 0 and outcome.words.count("kept, as it was built with these settings") == 1
    assert contents(folder) == contents(whole("index"))
