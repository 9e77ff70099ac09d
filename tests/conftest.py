"""What the tests share: an environment without network, small random language models, sample texts, the real Gemma."""

from __future__ import annotations

import csv
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before the first import of a Hugging Face library: each reads its environment once. HF_HOME stays the user's, so that
# the Gemma converted into it serves the next run too; what tests load from temporary files does not belong there.
_SCRATCH = tempfile.mkdtemp(prefix="hf_selortho-tests-")
os.environ["HF_DATASETS_CACHE"] = os.path.join(_SCRATCH, "datasets")
os.environ["HF_METRICS_CACHE"] = os.path.join(_SCRATCH, "metrics")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # results must not depend on who is logged in
os.environ.pop("HF_TOKEN", None)
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests start processes
os.environ["MPLBACKEND"] = "Agg"


def _take_a_share_of_the_cores() -> None:
    """Under `pytest -n`, each worker and what it starts keeps to cores of its own: threads of many that wait for one
    another on the same cores are slower than one."""
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        number = int(worker.removeprefix("gw"))
        os.sched_setaffinity(0, cores[number::workers] or [cores[number % len(cores)]])


_take_a_share_of_the_cores()

import pyarrow
import pyarrow.parquet
import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:
    from hf_selortho.language_models.loading import LanguageModel
    from tests.hub_client import HubClient
    from tests.loopback_hub import LoopbackHub

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(4, torch.get_num_threads()))  # on models this small, more only wait for one another

FIXTURES_OF_THE_REAL_MODEL = {"embedded_lm", "demo_run"}
DEMO_STEPS = {"max_steps": 40, "buffer_contexts": 256, "refresh_every": 8, "eval_samples": 40, "eval_ce_samples": 4}
LONGEST_FILES = {"test_fuzzing.py", "test_faults.py"}
DEMO_FILES = {"test_demo.py", "test_page_in_browser.py"}


def pytest_unconfigure() -> None:
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before pytest's own `-m` deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs the real Gemma is slow, whether or not its author remembered to say so; files with slow ones
    come first, so that under `pytest -n` no worker begins with one when the others are done."""
    slow_files = set()
    for item in items:
        if FIXTURES_OF_THE_REAL_MODEL & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow"):
            slow_files.add(item.path)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (item.path.name not in LONGEST_FILES, item.path not in slow_files))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file stay on one worker, since they share fixtures; so do those of the files of the demo."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "demo" if file.rsplit("/", 1)[-1] in DEMO_FILES else file

    return Scheduling(config, log)


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI (HF_SELORTHO_CI=1) a skip is a failure: a green run must mean that everything was looked at."""
    expected_failure = hasattr(report, "wasxfail")
    if report.skipped and not expected_failure and os.environ.get("HF_SELORTHO_CI") == "1":
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, which HF_SELORTHO_CI=1 forbids: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not item.get_closest_marker("gpu") or torch.cuda.is_available():
        _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid_skip(report)  # a whole module: importorskip, pytest.skip(allow_module_level=True)
    return report


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The order of the tests must not decide their random numbers."""
    torch.manual_seed(0)
    random.seed(0)


_SENTENCE = [
    ["The market", "A young engineer", "Our committee", "The old river", "A company", "The minister"],
    [
        "reported",
        "discovered",
        "built",
        "described",
        "refused",
        "followed",
        "measured",
        "remembered",
        "sold",
        "answered",
    ],
    [
        "a new engine",
        "the long winter",
        "higher prices",
        "an open question",
        "two bridges",
        "the match",
        "a cheap phone",
    ],
    ["in the city.", "near the coast.", "after the vote.", "before the season.", "on Monday.", "in {} cases."],
]


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(words) for words in _SENTENCE).format(rng.randint(2, 99))


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


@pytest.fixture(scope="session")
def sample_documents() -> list[str]:
    """400 different documents of 3 to 9 English sentences, one line each; the same ones in every run."""
    rng = random.Random(0)
    documents = [" ".join(_sentence(rng) for _ in range(rng.randint(3, 9))) for _ in range(400)]
    assert len(set(documents)) == len(documents)
    return documents


@dataclass(frozen=True)
class SampleTextFiles:
    """The sample documents in every format of a local file; csv, jsonl and parquet have the columns text and label."""

    csv: Path
    jsonl: Path
    parquet: Path
    txt: Path


@pytest.fixture(scope="session")
def sample_text_files(sample_documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> SampleTextFiles:
    folder = tmp_path_factory.mktemp("texts")
    files = SampleTextFiles(*(folder / f"sample.{kind}" for kind in ("csv", "jsonl", "parquet", "txt")))
    rows = [{"text": text, "label": number % 4} for number, text in enumerate(sample_documents)]
    with files.csv.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    files.jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), files.parquet)
    files.txt.write_text("".join(text + "\n" for text in sample_documents), encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def tiny_tokenizer(sample_documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens trained on the sample documents: any text survives it.

    Like Gemma's, it numbers its special tokens pad, eos, bos, unk and puts a BOS in front by itself.
    """
    special_tokens = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample_documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special_tokens, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _tiny_config(arch: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Four decoder layers, 32 wide; weights ten times as large as usual, so that every layer visibly matters."""
    shared = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if arch == "gpt2":
        return GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=256, **shared)
    shared |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 256}
    shared |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    if arch == "llama":
        return LlamaConfig(**shared)
    gemma = {"gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}[arch]
    layer_types = ["sliding_attention", "full_attention"] * 2
    return gemma(layer_types=layer_types, sliding_window=16, query_pre_attn_scalar=8, **shared)


@pytest.fixture(scope="session")
def tiny_lm_dir(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`tiny_lm_dir("gemma2" | "gemma3" | "llama" | "gpt2")`: folder of a small random float32 model with tokenizer."""

    @functools.cache
    def build(arch: str) -> Path:
        folder = tmp_path_factory.mktemp(f"tiny-{arch}")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_tiny_config(arch, tiny_tokenizer), dtype=torch.float32)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_lm(tiny_lm_dir: Callable[[str], Path]) -> Callable[[str], LanguageModel]:
    """`tiny_lm(arch)`: the same models, loaded as the package loads them, in float32 on the CPU."""
    from hf_selortho.language_models.loading import load_language_model

    return functools.cache(lambda arch: load_language_model(str(tiny_lm_dir(arch)), dtype="float32"))


@pytest.fixture(scope="session")
def embedded_lm() -> LanguageModel:
    """The real Gemma 3 270M of the extra `demo`; the first use on a machine converts it, which takes a minute."""
    from hf_selortho.language_models.loading import load_language_model

    return load_language_model("gemma-3-270m")


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `accelerate launch scripts/train.py --preset demo`, only shorter: two SAEs of the real Gemma."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    shorter = [part for key, value in DEMO_STEPS.items() for part in (f"--{key}", str(value))]
    command = ["-m", "accelerate.commands.launch", "scripts/train.py", "--preset", "demo", *shorter]
    done = subprocess.run(
        [sys.executable, *command, "--output_dir", str(folder)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out evaluation" in done.stdout and "Next:" in done.stdout
    return folder


@pytest.fixture(scope="module")
def hub() -> Generator[LoopbackHub, None, None]:
    """A Hub on loopback, of the tests of a file."""
    from tests.loopback_hub import LoopbackHub

    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Generator[HubClient, None, None]:
    """A process that works with that Hub, in a home folder of its own."""
    from tests.hub_client import HubClient

    with HubClient(hub.environment(tmp_path_factory.mktemp("home"))) as client:
        yield client


class SmallDisk:
    """A file system of its own, of some size; where none may be mounted, a limit on the files of a process."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder = folder
        folder.mkdir()
        self.mounted = self._mount(f"size={size}")

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        try:
            return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
        except FileNotFoundError:
            return False

    @property
    def reason(self) -> str:
        """What a write beyond it says."""
        return "the disk is full" if self.mounted else "File too large"

    def limit(self) -> None:
        """What a process on this disk has to call first."""
        if not self.mounted:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))  # less than the record of a shard

    def enlarge(self) -> None:
        if self.mounted:
            assert self._mount("remount,size=50m")

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], capture_output=True, timeout=20, check=True)


@pytest.fixture
def small_disks(tmp_path: Path) -> Generator[Callable[[str], SmallDisk], None, None]:
    """`small_disks("2m")`: a disk of that size in a folder of its own."""
    made: list[SmallDisk] = []

    def make(size: str) -> SmallDisk:
        made.append(SmallDisk(tmp_path / f"disk{len(made)}", size))
        return made[-1]

    yield make
    for disk in made:
        disk.remove()
