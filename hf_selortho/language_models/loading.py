"""Load causal language models of transformers, frozen, and find their decoder layers."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import SelOrthoError
from ..utils.files import fingerprint
from ..utils.hub import LOOKUP_ERRORS, find_file, hub_error, official_name, resolve_commit
from ..utils.library_errors import TOKENIZER_REMEDY, one_line, storage_error
from ..utils.names import located
from ..utils.privacy import LOCAL_MODEL
from .embedded import EMBEDDED_MODEL, GGUF_SHA256, embedded_model_dir
from .token_text import special_ids

_ADAPTER = "adapter_config.json"  # of PEFT
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in eval mode, without gradients, on its device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # as given: Hub id, local folder or "gemma-3-270m"
    revision: str  # what was really loaded, see `load_language_model`
    layers_path: str  # path of the list of decoder layers in the model, such as "model.layers"

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, the first one at 0."""
        return cast(nn.ModuleList, self.model.get_submodule(self.layers_path))

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that have an embedding."""
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    @property
    def pad_id(self) -> int:
        """Token id that fills up a batch, and that nothing attends to: 0 where the tokenizer has none of its own."""
        pad_id = self.tokenizer.pad_token_id
        return pad_id if pad_id is not None and pad_id < self.vocabulary else 0


def load_language_model(
    name: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    token: str | None = None,
) -> LanguageModel:
    """Load a causal language model of transformers to read activations from.

    Args:
        name: Hub id, local folder, or "gemma-3-270m" (embedded, needs the extra `demo` and no network).
        revision: branch, tag or commit of a Hub id; of the others, the `revision` that an earlier load gave, to make
            sure that the model is still the same one.
        dtype: "auto" is bfloat16 where the device computes faster in it and float32 elsewhere. It is never float16,
            in which Gemma's activations overflow.
        device: where the model goes.
        token: access token of the Hub; without it, the stored one or HF_TOKEN.

    Returns:
        The model. Its `revision` pins what was loaded: the commit of a Hub id, "gguf-sha256:<hash>" of the embedded
        model, "local-sha256:<hash>" of a folder. The last is a fingerprint of `config.json` and of name, size, first
        and last megabyte of each weight file, not of every byte.

    Raises:
        SelOrthoError: the model is unknown, gated, unreachable, unreadable, or no decoder-only language model, or its
            tokenizer belongs to another one.
    """
    name, where, commit = _locate(name, revision, token)
    where["trust_remote_code"] = False  # None would ask the person at the keyboard
    try:
        target = torch.empty(0, device=device).device  # "cuda" without a GPU fails here
        target_dtype = _resolve_dtype(dtype, target)
        config = AutoConfig.from_pretrained(**where)
        auto_model = _auto_model(config, name)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model, info = auto_model.from_pretrained(**where, config=config, dtype=target_dtype, output_loading_info=True)
        model = model.to(target).eval().requires_grad_(False)
    except SelOrthoError:
        raise
    except Exception as error:  # whatever transformers and the libraries below it raise for files that are not right
        reason = one_line(error)
        if isinstance(error, (LookupError, AttributeError, TypeError)):  # a bare name says nothing
            reason = f"its files are damaged or not of the form expected ({type(error).__name__}: {reason})"
        said = f'cannot load the language model "{name}": {reason}'
        raise storage_error(error) or SelOrthoError(said) from error
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = sorted(info["missing_keys"])
        raise SelOrthoError(f'the weights of "{name}" lack {len(missing)} tensors of its config, such as {missing[0]}')
    lm = LanguageModel(model, tokenizer, official_name(name), commit, find_decoder_layers(model))
    _check_tokenizer(lm)
    return lm


def find_revision(name: str, revision: str | None = None, token: str | None = None) -> str:
    """Find the `revision` that [`load_language_model`] would give, without loading the weights; raises as it does."""
    return _locate(name, revision, token)[2]


def load_config(name: str, revision: str | None = None, token: str | None = None) -> PreTrainedConfig:
    """Read the config of a language model, without its weights; raises as [`load_language_model`] does."""
    name, where, _ = _locate(name, revision, token)
    try:
        return AutoConfig.from_pretrained(**where, trust_remote_code=False)
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise SelOrthoError(f'cannot read the config of the language model "{name}": {one_line(error)}') from error


def find_decoder_layers(model: PreTrainedModel) -> str:
    """Find the path of the list of decoder layers in a language model of transformers, such as "model.layers".

    It is the outermost `ModuleList` with as many entries as the text config has hidden layers; where there are
    several (a vision tower of the same depth), the one within `get_decoder()`.

    Raises:
        SelOrthoError: no list or several fit; the message names all lists.
    """
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    fitting = [path for path in lists if len(lists[path]) == depth]
    # A layer may itself hold a list, of experts for example, that happens to have the same length.
    outer = [path for path in fitting if not any(path.startswith(other + ".") for other in fitting)]
    if len(outer) > 1:
        within = set(model.get_decoder().modules())
        outer = [path for path in outer if lists[path] in within]
    if len(outer) != 1:
        listed = ", ".join(f"{path} ({len(module)})" for path, module in lists.items()) or "none"
        raise SelOrthoError(
            f"cannot tell which modules of {type(model).__name__} are its decoder layers: expected one list of length "
            f"{depth} (num_hidden_layers), found {listed}; choose a model with one plain stack of layers"
        )
    return outer[0]


def check_context_length(lm: LanguageModel, context_length: int) -> None:
    """Raise a SelOrthoError if contexts are longer than the language model was made for."""
    config = lm.model.config.get_text_config(decoder=True)
    windows = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # the latter: MPT
    window = min((window for window in windows if isinstance(window, int)), default=context_length)
    if context_length > window:
        raise SelOrthoError(f'context_length {context_length}: "{lm.name}" reads at most {window} tokens at once')


def _auto_model(config: PreTrainedConfig, name: str) -> Any:
    """Choose the class of transformers that loads a model whose logits are those of the next token."""
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise SelOrthoError(
            f'"{name}" is an encoder-decoder model ({config.model_type}); choose a decoder-only language model'
        )
    auto_models: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForMultimodalLM)
    for auto_model in auto_models:
        if type(config) in auto_model._model_mapping:
            return auto_model
    raise SelOrthoError(f'"{name}" is no language model (its type is {config.model_type}); choose a decoder-only one')


def _check_tokenizer(lm: LanguageModel) -> None:
    """Refuse a tokenizer of which the language model cannot read every text.

    Special tokens count only where they are written: text that spells them stays text.
    """
    tokenizer = lm.tokenizer
    written = set(tokenizer.get_vocab().values()) - (special_ids(tokenizer) - {tokenizer.bos_token_id})
    if len(written) < 2:  # what transformers makes of a folder without one
        raise SelOrthoError(f'the tokenizer of "{lm.name}" knows no tokens; {TOKENIZER_REMEDY}')
    if max(written) >= lm.vocabulary:
        raise SelOrthoError(
            f'the tokenizer of "{lm.name}" gives token ids up to {max(written)}, and the model has embeddings for 0 to '
            f"{lm.vocabulary - 1}; {TOKENIZER_REMEDY}"
        )


def _locate(name: str, revision: str | None, token: str | None) -> tuple[str, dict[str, Any], str]:
    """Find a model's name without what typing has added, what `from_pretrained` is to be given, and its revision."""
    if name == LOCAL_MODEL or (str(revision).startswith("local-") and not Path(name).is_dir()):
        raise SelOrthoError(
            f'the language model "{name}" is a folder of the machine that it was used on, which is not here: pass its '
            "folder or Hub id, as --model (browse: --lm), in Python as lm="
        )
    name, lookup = located(name, {"revision": revision}, "model")
    revision = lookup["revision"]
    folder = embedded_model_dir() if name == EMBEDDED_MODEL else Path(name)
    if folder.is_dir():
        if (folder / _ADAPTER).is_file():
            raise _adapter_error(name)
        if not (folder / "config.json").is_file():
            raise SelOrthoError(f"{folder} holds no config.json: expected the folder of a model of transformers")
        current = f"gguf-sha256:{GGUF_SHA256}"
        if name != EMBEDDED_MODEL:
            weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
            current = f"local-sha256:{fingerprint(weights, (folder / 'config.json').read_bytes())}"
        if revision not in (None, current):
            raise SelOrthoError(
                f'"{name}" is at revision {current}, not at {revision}: leave the revision out to take it as it is'
            )
        return name, {"pretrained_model_name_or_path": str(folder)}, current
    online = resolve_commit("model", name, revision, token) is not None
    try:
        # By branch, not by commit, so that the cache learns what the branch stands for when there is no network.
        config = hf_hub_download(name, "config.json", revision=revision, token=token, local_files_only=not online)
    except LOOKUP_ERRORS as error:
        if isinstance(error, EntryNotFoundError) and online:
            if find_file(name, _ADAPTER, {"revision": revision, "token": token}):
                raise _adapter_error(name) from error
        raise hub_error(error, "model", name, revision) from error
    commit = Path(config).parent.name  # .../snapshots/<commit>/config.json, offline too
    options = {"revision": commit, "token": token, "local_files_only": not online}
    return name, {"pretrained_model_name_or_path": name, **options}, commit


def _adapter_error(name: str) -> SelOrthoError:
    return SelOrthoError(
        f'"{name}" holds an adapter ({_ADAPTER}), not a whole language model: merge it into its model with PEFT '
        "(merge_and_unload, then save_pretrained, the tokenizer too) and give that folder as --model"
    )


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype not in _DTYPES:
        raise SelOrthoError(f'unknown dtype "{dtype}": choose {", ".join(_DTYPES)}')
    if dtype == "auto":
        dtype = "bfloat16" if _computes_bfloat16(device) else "float32"
    return cast(torch.dtype, getattr(torch, dtype))


def _computes_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 is faster than float32, by what the device is: a timing might differ when a run resumes."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else platform.processor()
    # AVX512-BF16 alone doubles the speed on AMD's processors; on Intel's, without AMX, it is 0.6 of float32's.
    doubled = torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in processor
    return torch.cpu._is_amx_tile_supported() or doubled
