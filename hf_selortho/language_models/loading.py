"""Frozen language models, whole, and the list of decoder layers inside them."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_selortho.errors import SelOrthoError
from hf_selortho.language_models.embedded import EMBEDDED_MODEL, GGUF_SHA256, embedded_model_dir
from hf_selortho.utils.fingerprint import fingerprint
from hf_selortho.utils.hub import LOOKUP_ERRORS, hub_error, one_line, resolve_commit

_AutoModel: Any = AutoModelForCausalLM  # its type hints do not know output_loading_info
# The last three: values in its files that transformers does not expect.
_LOAD_ERRORS: tuple[type[Exception], ...] = (
    *(*LOOKUP_ERRORS, KeyError, RuntimeError, ImportError, SafetensorError),
    *(TypeError, AttributeError, StrictDataclassError),
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LanguageModel:
    """A frozen causal language model: in eval mode, without gradients, on its device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # as given: Hub id, local folder or "gemma-3-270m"
    revision: str | None  # what was really loaded, see `load_language_model`
    layers: nn.ModuleList  # the decoder layers, the first one at 0
    layers_path: str  # where they are in the model, such as "model.layers"

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def num_layers(self) -> int:
        return len(self.layers)


class _Source(NamedTuple):
    location: str  # what from_pretrained is given
    commit: str | None  # the commit of a Hub id
    revision: str
    cached_only: bool = False  # the Hub cannot be reached


def load_language_model(
    name: str,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
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
        SelOrthoError: the model is unknown, gated, unreachable, unreadable, or no decoder-only language model.
    """
    target = _device(device)
    target_dtype = _resolve_dtype(dtype, target)
    source = _locate(name, revision, token)
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": source.location,
        "revision": source.commit or "main",
        "token": token,
        "trust_remote_code": False,
        "local_files_only": source.cached_only,
    }
    try:
        config = AutoConfig.from_pretrained(**where)
        if getattr(config, "is_encoder_decoder", False):
            raise SelOrthoError(
                f'"{name}" is an encoder-decoder model ({config.model_type}); choose a decoder-only language model'
            )
        tokenizer = AutoTokenizer.from_pretrained(**where)
        options = {"config": config, "dtype": target_dtype, "output_loading_info": True}
        model, info = _AutoModel.from_pretrained(**where, **options)
    except UnpicklingError as error:
        raise SelOrthoError(
            f'the weights of "{name}" are a pickle of more than tensors, which could run code: choose a model with '
            "safetensors weights"
        ) from error
    except _LOAD_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise SelOrthoError(
                f'cannot load the language model "{name}": it needs code of its own repository, which is not run; '
                "choose a model that transformers knows"
            ) from error
        raise SelOrthoError(f'cannot load the language model "{name}": {one_line(error)}') from error
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = sorted(info["missing_keys"])
        raise SelOrthoError(f'the weights of "{name}" lack {len(missing)} tensors of its config, such as {missing[0]}')
    model = model.to(target).eval().requires_grad_(False)
    _refuse_bidirectional(model, name)
    layers_path, layers = find_decoder_layers(model)
    return LanguageModel(model, tokenizer, name, source.revision, layers, layers_path)


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers of a language model of transformers and their path in it, such as "model.layers".

    They are the outermost `ModuleList` with as many entries as the text config has hidden layers; where there are
    several (a vision tower of the same depth), the one within `get_decoder()`.

    Raises:
        SelOrthoError: no list or several fit; the message names all lists.
    """
    config = getattr(model, "config", None)
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) if config is not None else None
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    fitting = [path for path in lists if len(lists[path]) == depth]
    # A layer may itself hold a list, of experts for example, that happens to have the same length.
    outer = [path for path in fitting if not any(path.startswith(other + ".") for other in fitting)]
    if len(outer) > 1 and isinstance(model, PreTrainedModel):
        within = {id(module) for module in model.get_decoder().modules()}
        outer = [path for path in outer if id(lists[path]) in within]
    if len(outer) != 1:
        found = ", ".join(f"{path} ({len(module)})" for path, module in lists.items()) or "none"
        raise SelOrthoError(
            f"cannot tell which modules of {type(model).__name__} are its decoder layers: expected one list of length "
            f"{depth} (num_hidden_layers), found {found}; choose a model with one plain stack of layers"
        )
    return outer[0], lists[outer[0]]


def find_revision(name: str, revision: str | None = None, token: str | None = None) -> str | None:
    """The `revision` that [`load_language_model`] would give, without loading the weights; raises as it does."""
    return _locate(name, revision, token).revision


def check_layer(lm: LanguageModel | int, layer: int) -> None:
    """Raise a SelOrthoError unless `layer` counts a decoder layer of `lm` (or of that many layers) from 0."""
    name, count = ("the model", lm) if isinstance(lm, int) else (f'"{lm.name}"', lm.num_layers)
    if not 0 <= layer < count:
        raise SelOrthoError(f"layer {layer} is out of range: {name} has {count} layers, choose 0 to {count - 1}")


def check_context_length(lm: LanguageModel, context_length: int) -> None:
    """Raise a SelOrthoError if contexts are longer than the language model was made for."""
    window = getattr(lm.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if window is not None and context_length > window:
        raise SelOrthoError(f'context_length {context_length}: "{lm.name}" reads at most {window} tokens at once')


def _locate(name: str, revision: str | None, token: str | None) -> _Source:
    folder = Path(name).expanduser()
    if name == EMBEDDED_MODEL:
        return _pinned(name, str(embedded_model_dir()), f"gguf-sha256:{GGUF_SHA256}", revision)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SelOrthoError(f"{folder} holds no config.json: expected the folder of a model of transformers")
        return _pinned(name, str(folder), _fingerprint(folder), revision)
    commit = resolve_commit("model", name, revision, token)
    try:
        # By branch, not by commit, so that the cache learns what the branch stands for when there is no network.
        config = hf_hub_download(name, "config.json", revision=revision, token=token, local_files_only=commit is None)
    except LOOKUP_ERRORS as error:
        raise hub_error(error, "model", name, revision, token) from error
    found = Path(config).parent.name  # .../snapshots/<commit>/config.json, offline too
    return _Source(name, found, found, cached_only=commit is None)


def _pinned(name: str, location: str, found: str, expected: str | None) -> _Source:
    if expected not in (None, found):
        raise SelOrthoError(
            f'"{name}" is at revision {found}, not at {expected}: leave the revision out to take the model as it is'
        )
    return _Source(location, None, found)


def _fingerprint(folder: Path) -> str:
    """Identify a local model."""
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return f"local-sha256:{fingerprint(weights, (folder / 'config.json').read_bytes())}"


def _device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)  # "cuda" without a GPU fails here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SelOrthoError(f'device "{device}" cannot be used here: {one_line(error)}') from error
    return target


def _resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if _computes_bfloat16(device) else torch.float32
    if dtype not in _DTYPES:
        raise SelOrthoError(f'unknown dtype "{dtype}": choose auto, {", ".join(_DTYPES)}')
    return _DTYPES[dtype]


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32. By what the device is, not by a timing: a resumed run must choose alike.

    AVX512-BF16 alone doubles the speed on AMD's processors; on Intel's, without AMX, it is 0.6 of float32's.
    """
    if device.type == "cpu":
        if torch.cpu._is_amx_tile_supported():
            return True
        return torch.cpu._is_avx512_bf16_supported() and "AMD" in _processor_vendor()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _processor_vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), "")


@torch.inference_mode()
def _refuse_bidirectional(model: PreTrainedModel, name: str) -> None:
    """BERT and its kind load as causal models too, and then attend to later tokens."""
    if getattr(model.config, "is_decoder", None) is not False:  # GPT-NeoX says so as well, and is one
        return
    outputs = [model(torch.tensor([[5, 6, end]], device=model.device)).logits[0] for end in (7, 8)]  # (3, vocab) each
    first, _, last = (outputs[0] - outputs[1]).float().abs().amax(-1).tolist()
    if first > 1e-4 * last:  # the last token changes what comes out at the first one
        raise SelOrthoError(
            f'"{name}" ({model.config.model_type}) reads its text in both directions; '
            "choose a decoder-only language model"
        )
