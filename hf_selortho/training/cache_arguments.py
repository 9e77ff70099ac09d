"""Arguments of `selortho cache`; a preset of a training sets the language model, the text and the layer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from ..configuration_selortho import SITE, SITES
from ..data.cache_manifest import STORED_DTYPES, CacheSettings, tokenizer_hash
from ..data.text_source import TextSource
from ..errors import SelOrthoError
from ..utils.options import (
    Above1,
    Count,
    CountOrZero,
    Range,
    Seed,
    argument,
    check_values,
    given_names,
    one_of,
    refuse_contradictions,
)
from .arguments import ModelArguments, TextArguments, module_site, parse_groups
from .contradictions import CACHE

if TYPE_CHECKING:  # not for a --help that waits for datasets
    from ..data.texts import Documents
    from ..language_models.capture import ActivationCapture


@dataclass
class CacheArguments:
    """What is read, and where it goes."""

    layers: list[int] = argument([], "Decoder layers, counted from 0, at which activations are read in one pass.")
    site: Annotated[str, Range(*SITE)] = argument(
        "resid_post", f"Where at each layer: {', '.join(SITES)}, or a module as PATH:input or PATH:output."
    )
    target: Annotated[str, Range(*SITE)] | None = argument(
        None, "A second site to store beside it, which transcoders reconstruct, such as mlp_out."
    )
    output_dir: str = argument("activations", "Folder for the shards; `selortho push` publishes it as a dataset.")
    overwrite_output_dir: bool = argument(
        False, "Replace the cache that is in the output folder; an unfinished one of the same settings goes on."
    )
    context_length: Annotated[int, Range(lambda v: v >= 2, "at least 2")] = argument(
        128, "Longest context in tokens, BOS included."
    )
    prepend_bos: bool = argument(True, "Whether each context starts with BOS (left out of the activations).")
    max_norm_ratio: Above1 | None = argument(
        4.0, "Tokens whose norm exceeds this multiple of the median at one of the layers are left out; inf keeps all."
    )
    max_tokens: Count | None = argument(None, "Tokens to read, BOS included; default: all of the text, once.")
    eval_samples: CountOrZero = argument(1000, "Held-out contexts, stored apart for the evaluation.")
    stored_dtype: Annotated[str, one_of(*STORED_DTYPES)] = argument(
        "bfloat16", "bfloat16 or float32; never float16, in which Gemma's overflow."
    )
    shard_tokens: Count = argument(65_536, "Tokens whose activations make a shard.")
    seed: Seed = argument(0, "Seed of the order of the documents.")
    cpu: bool = argument(False, "Use the CPU even where there is an accelerator.")
    cpu_threads: Count | None = argument(None, "Threads of each process on a CPU; default: its share of all cores.")
    dry_run: bool = argument(False, "Say what would be done and what it needs, and stop.")


def parse_cache_arguments(argv: list[str]) -> tuple[ModelArguments, TextArguments, CacheArguments]:
    """Read the arguments of a command line, on top of those of its preset.

    Raises:
        SelOrthoError: a value is not allowed, arguments contradict one another, or no language model or layer is
            given. Unknown arguments exit with code 2.
    """
    groups = (ModelArguments, TextArguments, CacheArguments)
    known = {f.name for group in groups for f in fields(group)} - {"output_dir"}

    def adapt(preset: dict[str, Any]) -> dict[str, Any]:
        layers = {"layers": preset["layer"]} if "layer" in preset else {}
        return {key: value for key, value in {**preset, **layers}.items() if key in known}

    words = "Language model, text and layer of a preset of a training."
    model, text, arguments, _ = parse_groups(argv, groups, words, adapt)
    if model.model is None:
        raise SelOrthoError("no language model given: pass --model (a Hub id or a folder), or --preset demo")
    if model.module:
        arguments.site, layer = module_site(model)
        arguments.layers = [layer]
    if not arguments.layers:
        raise SelOrthoError("no layers given: pass --layers, the decoder layers (counted from 0) at which to read")
    if arguments.max_norm_ratio == float("inf"):
        arguments.max_norm_ratio = None
    check_values(model, text, arguments)
    refuse_contradictions(CACHE, given_names(argv), {**vars(model), **vars(text), **vars(arguments)})
    return model, text, arguments


def cache_settings(
    capture: ActivationCapture, documents: Documents, text: TextArguments, arguments: CacheArguments, processes: int
) -> CacheSettings:
    """Put together everything that decides what the shards hold."""
    lm = capture.lm
    return CacheSettings(
        **{f.name: getattr(text, f.name) for f in fields(TextSource)} | {"dataset_revision": documents.revision},
        text_fingerprint=documents.fingerprint,
        text_rows=documents.count,
        seed=arguments.seed,
        lm_name=lm.name,
        lm_revision=lm.revision,
        lm_dtype=str(lm.model.dtype).removeprefix("torch."),
        lm_batch_tokens=capture.batch_tokens,
        lm_device=capture.device.type,
        tokenizer_sha256=tokenizer_hash(lm.tokenizer, chats=text.chat_column is not None),
        context_length=arguments.context_length,
        prepend_bos=arguments.prepend_bos,
        min_tokens=text.min_tokens,
        site=arguments.site,
        target=arguments.target,
        layers=capture.layers,
        stored_dtype=arguments.stored_dtype,
        max_norm_ratio=arguments.max_norm_ratio,
        max_tokens=arguments.max_tokens,
        held_out_contexts=arguments.eval_samples,
        shard_tokens=arguments.shard_tokens,
        processes=processes,
    )
