"""An SAE with what it reads, found by what its config says and a command line may say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..configuration_selortho import SelOrthoConfig
from ..data.text_source import TextSource
from ..errors import SelOrthoError
from ..features import warn_of_other_lm
from ..features.token_features import check_centering, check_site, open_capture
from ..formats import load_sae
from ..language_models.capture import ActivationCapture
from ..language_models.loading import LanguageModel, check_context_length, load_language_model
from ..modeling_selortho import SelOrthoSAE
from ..training.run_folder import MOVED
from ..utils.hub import LOOKUP, find_file
from ..utils.library_errors import one_line
from ..utils.privacy import LOCAL_TEXT
from .reading_arguments import ReadingArguments


def load(name: str, lookup: Mapping[str, Any], device: str) -> SelOrthoSAE:
    """Load an SAE of any format, ready to encode."""
    sae: Any = load_sae(name, **lookup)
    return sae.to(device).eval()


def text_source(config: SelOrthoConfig, arguments: ReadingArguments) -> TextSource:
    """The dataset of the command line, else that of the training with the same documents held out.

    Raises:
        SelOrthoError: neither says which, or the training held nothing out.
    """
    same = arguments.dataset is None
    if same and config.dataset == LOCAL_TEXT:
        raise SelOrthoError("the SAE was trained on a text that was not published: --dataset is needed")
    fraction = arguments.held_out_fraction
    if fraction is None:
        fraction = config.held_out_fraction if same and config.held_out_fraction is not None else 0.1
    if not 0 < fraction <= 1:
        raise SelOrthoError(
            f"held-out fraction {fraction}: expected a share in (0, 1]; an SAE whose training held nothing out needs "
            "another --dataset"
        )
    chats = arguments.chat_column or (config.chat_column if same and arguments.text_column is None else None)
    return TextSource(
        dataset=required(arguments.dataset or config.dataset, "--dataset"),
        dataset_config=arguments.dataset_config or (config.dataset_config if same else None),
        split=arguments.split or (config.dataset_split if same else None) or "train",
        text_column=arguments.text_column or (config.text_column if same and chats is None else None),
        chat_column=chats,
        chat_roles=arguments.chat_roles or (config.chat_roles if chats else None),
        separator=arguments.separator or (config.separator if same else None),
        encoding=arguments.encoding or (config.encoding if same else None),
        dataset_revision=config.dataset_revision if same else None,
        streaming=arguments.streaming,
        held_out_fraction=fraction,
    )


def load_lm_of(config: SelOrthoConfig, arguments: ReadingArguments) -> LanguageModel:
    """The language model of the command line, else that of the training.

    Raises:
        SelOrthoError: neither says which, it cannot be loaded, or the SAE reads no site of it that is known.
    """
    check_site(config)
    return load_language_model(
        required(arguments.model or config.lm_name, "--model"),
        arguments.model_revision or (config.lm_revision if arguments.model is None else None),
        dtype=arguments.lm_dtype,
        device=arguments.device,
    )


def capture_of(config: SelOrthoConfig, lm: LanguageModel, arguments: ReadingArguments) -> ActivationCapture:
    """The language model at the SAE's site and target, sinks left out as in training; warns if it is another one.

    Raises:
        SelOrthoError: neither the command line nor the SAE says which layer it reads, or it reads centred activations
            of another language model, or ones of another width.
    """
    warn_of_other_lm(config, lm)
    check_centering(config, lm)
    check_context_length(lm, config.context_length)
    layer = config.layer_of_site if arguments.layer is None else arguments.layer
    return open_capture(config, lm, required(layer, "--layer"))


def least_tokens(config: SelOrthoConfig, arguments: ReadingArguments) -> int:
    """Tokens below which a context is left out."""
    return arguments.min_tokens or config.min_tokens or 8


def required(value: Any, name: str) -> Any:
    """The value, or an error that says what to give."""
    if value is None:
        raise SelOrthoError(f"the SAE's config does not say what it was trained on: {name} is needed")
    return value


def read_moved(source: str, lookup: Mapping[str, Any], d_sae: int) -> list[float]:
    """Read how far each feature has moved since the start of its training; nothing where that was not another SAE.

    Raises:
        SelOrthoError: the file is damaged.
    """
    if Path(source).is_file():  # of another library
        return []
    path = find_file(source, MOVED, {key: value for key, value in lookup.items() if key in LOOKUP})
    if path is None:
        return []
    try:
        cosines = load_file(path)["decoder"]
    except (OSError, SafetensorError, KeyError) as error:
        raise SelOrthoError(f"{path} is damaged ({one_line(error)}): train again, or remove it") from error
    if cosines.shape != (d_sae,):
        raise SelOrthoError(f"{path} is of another SAE than of {d_sae} features: remove it")
    return (1 - cosines.float()).tolist()
