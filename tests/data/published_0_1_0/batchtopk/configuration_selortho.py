"""Configuration of a selective-orthogonality sparse autoencoder.

Every setting of the SAE is declared here once; the command line of the training script is derived from these fields
(whose annotations must therefore be types, not strings: no `from __future__ import annotations` here).
"""

import difflib
import logging
import math
import os
import reprlib
from collections.abc import Iterable
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from transformers import PreTrainedConfig

from .errors import ConfigError
from .saved_files import CONFIG, LOOKUP, find_file, no_such_sae, read_object, within_reach

logger = logging.getLogger(__name__)

CONFIG_VERSION = 1

Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]
Penalty = Literal["selective", "full", "ortsae", "none"]
Space = Literal["activation", "decoder", "redundancy", "exclusion"]
SelectionSpace = Literal["same", "activation", "decoder", "redundancy"]
DecoderPairs = Literal["alike", "nearest"]
PenaltySchedule = Literal["on_selection", "every_step"]
Correlation = Literal["cosine", "pearson"]
Reduction = Literal["mean", "sum"]
InputNormalization = Literal["standard", "none"]


_LARGEST_INT = 2**63 - 1
_MOST_UNKNOWN = 100  # settings of a later version, or of the user
_DTYPES = ("bfloat16", "float16", "float32", "float64")
# What transformers declares and never checks. A dtype has a check of its own.
_INHERITED: dict[str, tuple[type, ...]] = {
    "transformers_version": (str, type(None)),
    "architectures": (list, type(None)),
    "output_hidden_states": (bool, type(None)),
    "return_dict": (bool, type(None)),
    "chunk_size_feed_forward": (int,),
    "is_encoder_decoder": (bool,),
    "id2label": (dict, type(None)),
    "label2id": (dict, type(None)),
    "problem_type": (str, type(None)),
}
# What transformers writes beside the fields; "auto_map" names code of a repository, which only the Auto classes run.
_UNREAD = {"auto_map", "model_type", "name_or_path", "_name_or_path", "output_attentions", "torch_dtype"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlist = 20


def _setting(default: Any, description: str) -> Any:
    return field(default=default, metadata={"help": description})


def score_of_selection(penalty_space: str, selection_space: str) -> str:
    """By which score ("activation", "decoder" or "redundancy") these settings of [`SelOrthoConfig`] select pairs."""
    own = "decoder" if penalty_space == "exclusion" else penalty_space
    return own if selection_space == "same" else selection_space


class SelOrthoConfig(PreTrainedConfig):
    """Settings of a [`SelOrthoSAE`] and of the language-model activations that it was trained on.

    The loss is eq. 7 of the paper: `mean_B |x_hat - x|^2 + l1_coefficient * mean_B |h|_1 + ortho_coefficient * R *
    sum_T c_ij^2`, where `T` are the `ceil(pair_fraction * n (n - 1) / 2)` most correlated pairs of features of the
    batch. The fields carry their own description: `SelOrthoConfig.describe()` returns them.

    Raises:
        ConfigError: a value is not allowed; the message names the field, the value and what is allowed.
    """

    model_type = "selortho_sae"

    d_in: int | None = _setting(None, "Width of the language model's residual stream.")
    d_sae: int | None = _setting(None, "Number of features; the paper uses as many as d_in.")
    activation: Activation = _setting(
        "relu", "Activation function: relu (the paper), topk, batchtopk (k on average over a batch) or jumprelu."
    )
    k: int | None = _setting(None, "Active features per token; only with activation topk or batchtopk.")
    l1_coefficient: float = _setting(0.04, "Weight of the L1 sparsity term, eq. 7; it acts with activation relu only.")
    l0_coefficient: float = _setting(0.001, "Weight of the mean L0; it acts with activation jumprelu only.")
    jumprelu_bandwidth: float = _setting(0.05, "Width of the kernel through which jumprelu's thresholds learn.")
    jumprelu_threshold: float = _setting(0.01, "Thresholds of jumprelu at the start.")
    aux_k: int | None = _setting(
        None, "Dead features that explain what is left over, per token (topk, batchtopk); None: d_in / 2; 0: none."
    )
    aux_coefficient: float = _setting(1 / 32, "Weight of that auxiliary loss, which revives dead features.")
    matryoshka_prefixes: list[int] | None = _setting(
        None, "Numbers of first features that have to reconstruct on their own, rising, the last d_sae (batchtopk)."
    )
    penalty: Penalty = _setting(
        "selective",
        "Which pairs are decorrelated: the best-scored ones (selective), every pair (full), each feature's nearest in "
        "random chunks of the decoder (ortsae), none.",
    )
    penalty_space: Space = _setting(
        "activation",
        "What the selective penalty squares: the pairs' correlation (activation, the paper), their decoder cosine "
        "(decoder), or that cosine times how symmetrically (redundancy) or how rarely (exclusion) they fire together.",
    )
    selection_space: SelectionSpace = _setting("same", "By which of these the pairs are selected; same: the penalty's.")
    # Measured (RESULTS.md, Gemma-3-270m): at 0.03 the top correlations fall by 29% (ReLU) and 36% (TopK) for 0.8% and
    # 2.3% more FVU; the paper's 0.1 buys 40% and 53%, for 3% and 10%.
    ortho_coefficient: float = _setting(0.03, "Weight of the decorrelation penalty, eq. 7 (the paper: 0.1).")
    decoder_ratio: float = _setting(
        0.0,
        "Weight, relative to ortho_coefficient, of a second penalty beside the selective one: the squared decoder "
        "cosine of pairs of features.",
    )
    decoder_pairs: DecoderPairs = _setting(
        "alike",
        "The pairs of that second penalty: the pair_fraction whose directions are most alike, or each feature and its "
        "nearest (as ortsae).",
    )
    pair_fraction: float = _setting(0.001, "Share of all feature pairs that the selective penalty acts on, eq. 5.")
    correlation_threshold: float = _setting(
        0.0, "Pairs whose score is below this are left alone; with a large pair_fraction, the threshold selects."
    )
    correlation: Correlation = _setting("cosine", "Uncentred cosine (eq. 4) or centred Pearson correlation.")
    reduction: Reduction = _setting("mean", "Penalty as the mean over the pairs or their sum (the paper).")
    min_support: int = _setting(
        4, "A feature takes part in a pair if it fired on at least this many tokens of the batch."
    )
    selection_interval: int = _setting(
        12, "Steps between two selections of pairs, which costs that many times less than the paper's 1."
    )
    penalty_schedule: PenaltySchedule = _setting(
        "on_selection",
        "Between selections, the penalty rests and then acts with the weight of all these steps (on_selection), or "
        "acts at every step on the pairs selected last (every_step).",
    )
    carry_decay: float = _setting(
        0.0, "Share of the earlier batches' co-activations that a selection carries over, so that rare features count."
    )
    ortsae_chunk: int = _setting(8192, "Features that the penalty ortsae compares with one another.")
    input_normalization: InputNormalization = _setting(
        "standard", "standard: centre the activations and scale them to a mean squared norm of 1; none: use them raw."
    )
    lm_name: str | None = _setting(None, "Language model whose activations the SAE reads.")
    lm_revision: str | None = _setting(None, "Resolved commit (or content hash) of the language model.")
    layer: int | None = _setting(None, "Decoder layer, counted from 0, after which the residual stream is read.")
    hook_name: str | None = _setting(None, "Module of the language model whose output is read.")
    context_length: int = _setting(128, "Longest context in tokens, BOS included.")
    prepend_bos: bool = _setting(True, "Whether each context starts with BOS (left out of the training data).")
    # Measured on Gemma-3-270m: ordinary tokens stay below 2.3 times the median norm, sinks start at 4.7 times.
    max_norm_ratio: float | None = _setting(
        4.0,
        "Tokens whose norm exceeds this multiple of the median are left out; None (--max_norm_ratio inf) keeps all.",
    )
    max_norm: float | None = _setting(None, "The norm that this came to: tokens of a larger one were left out.")
    dataset: str | None = _setting(None, "Dataset of the training text.")
    dataset_revision: str | None = _setting(None, "Resolved commit of the dataset.")
    dataset_config: str | None = _setting(None, "Configuration of the dataset, where it has several.")
    dataset_split: str | None = _setting(None, "Split of the dataset.")
    text_column: str | None = _setting(None, "Column of the dataset that holds the text.")
    min_tokens: int | None = _setting(None, "Contexts with fewer tokens than this were left out.")
    held_out_fraction: float | None = _setting(None, "Share of the documents that training never saw.")
    config_version: int = _setting(CONFIG_VERSION, "Version of this format.")

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_version()
        self._refuse_misspelt(kwargs)
        self._check_inherited()
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ConfigError(f"transformers refuses these settings: {error}") from error
        self._check_types()
        self._check_values()

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Content of a config.json, and the arguments that do not say where it is.

        Raises:
            SelOrthoError: there is none.
            ConfigError: it is damaged, or that of another kind of model.
        """
        name = os.fspath(pretrained_model_name_or_path)
        lookup = {key: kwargs.pop(key) for key in LOOKUP if key in kwargs}
        for key in ("_from_auto", "_from_pipeline", "gguf_file", "trust_remote_code", "code_revision"):
            kwargs.pop(key, None)
        path = Path(name) if os.path.isfile(name) else find_file(name, CONFIG, within_reach(name, lookup))
        if path is None:
            raise no_such_sae(name, lookup)
        content = read_object(path)
        if (kind := content.get("model_type", cls.model_type)) != cls.model_type:
            raise ConfigError(f"{path} has model_type={_SHORT.repr(kind)}, expected {cls.model_type!r}: this is no SAE")
        return content, kwargs

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """A configuration from a config.json of any name; raises as [`from_dict`] does."""
        return cls.from_dict(read_object(Path(json_file)))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from the content of a config.json; of that, only what is declared is taken.

        transformers would make an attribute of everything else, and follow some of it to other files and other code.

        Raises:
            ConfigError: a value is not allowed.
        """
        declared, own = {f.name for f in fields(cls)}, {f.name for f in cls.own_fields()}
        unknown = config_dict.keys() - declared - _UNREAD
        if len(unknown) > _MOST_UNKNOWN:
            raise ConfigError(
                f"{len(unknown)} settings that SelOrthoConfig does not know, such as {_SHORT.repr(min(unknown))}: "
                "is this the config of an SAE?"
            )
        cls._refuse_misspelt(unknown)
        if unknown:
            logger.warning("without effect, as SelOrthoConfig does not know them: %s", _SHORT.repr(sorted(unknown)))
        taken = {key: value for key, value in config_dict.items() if key in declared}
        overrides = {key: kwargs.pop(key) for key in own & kwargs.keys()}
        made: Any = super().from_dict({**taken, **overrides}, **kwargs)
        source = config_dict.get("auto_map")
        if cls.__module__.startswith("transformers_modules.") and isinstance(source, dict):
            # this class is itself a repository's code, which the user trusts: AutoModel looks here for the model's
            config = made[0] if isinstance(made, tuple) else made
            config.auto_map = {str(key): str(value) for key, value in source.items()}
        return made

    @classmethod
    def own_fields(cls) -> list[Field]:
        """The fields declared by this class, without those of `PreTrainedConfig`."""
        return [f for f in fields(cls) if "help" in f.metadata]

    @classmethod
    def default_settings(cls) -> dict[str, Any]:
        """Default of every field by name."""
        return {f.name: f.default for f in cls.own_fields()}

    @classmethod
    def describe(cls) -> dict[str, str]:
        """Description of every field by name."""
        return {f.name: f.metadata["help"] for f in cls.own_fields()}

    def own_settings(self) -> dict[str, Any]:
        """Values of the fields declared by this class."""
        return {f.name: getattr(self, f.name) for f in self.own_fields()}

    @property
    def selects_by(self) -> str:
        """The score by which pairs are selected: "activation", "decoder" or "redundancy"."""
        return score_of_selection(self.penalty_space, self.selection_space)

    @classmethod
    def _refuse_misspelt(cls, keys: Iterable[str]) -> None:
        # transformers keeps unknown keyword arguments as attributes: a misspelt setting would silently do nothing
        names = [f.name for f in cls.own_fields()]
        for key in keys:
            close = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
            if close:
                raise ConfigError(f"{key} is not a setting of SelOrthoConfig; did you mean {close[0]}?")

    def _check_version(self) -> None:
        version = self.config_version
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ConfigError(
                f"config_version={_SHORT.repr(version)}: expected a whole number from 1 to {CONFIG_VERSION}"
            )
        if version > CONFIG_VERSION:
            raise ConfigError(
                f"config_version={version}: this SAE was saved by a newer hf_selortho (this one reads up to version "
                f"{CONFIG_VERSION}); update with: pip install -U hf_selortho"
            )

    def _check_inherited(self) -> None:
        for name, allowed in _INHERITED.items():
            value = getattr(self, name)
            if type(value) not in allowed:
                names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
                raise ConfigError(f"{name}={_SHORT.repr(value)}: expected {names}, not {type(value).__name__}")
        dtype = str(self.dtype).removeprefix("torch.") if isinstance(self.dtype, torch.dtype) else self.dtype
        if dtype not in (None, *_DTYPES):
            raise ConfigError(f"dtype={_SHORT.repr(self.dtype)}: expected one of {', '.join(_DTYPES)}")

    def _check_types(self) -> None:
        for f in self.own_fields():
            allowed = get_args(f.type) or (f.type,)
            value = getattr(self, f.name)
            if f.name in ("d_in", "d_sae") and value is None:
                raise ConfigError(
                    f"{f.name} is missing: SelOrthoConfig needs d_in and d_sae, e.g. d_in=640, d_sae=1280"
                )
            if get_origin(allowed[0]) is list:
                self._check_list(f.name, value)
                continue
            self._check_size(f.name, value)
            if type(value) is int and float in allowed:
                value = float(value)
                setattr(self, f.name, value)
            if isinstance(allowed[0], str):
                if value not in allowed:
                    raise ConfigError(f"{f.name}={_SHORT.repr(value)}: expected one of {', '.join(map(repr, allowed))}")
            elif type(value) not in allowed:
                names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
                raise ConfigError(f"{f.name}={_SHORT.repr(value)}: expected {names}, not {type(value).__name__}")

    def _check_list(self, name: str, value: Any) -> None:
        if value is not None and (not isinstance(value, list) or any(type(item) is not int for item in value)):
            raise ConfigError(f"{name}={_SHORT.repr(value)}: expected None or a list of whole numbers")
        for item in value or ():
            self._check_size(name, item)

    def _check_size(self, name: str, value: Any) -> None:
        if type(value) is int and abs(value) > _LARGEST_INT:
            raise ConfigError(f"{name}={_SHORT.repr(value)}: expected a number below 2^63")

    def _check_values(self) -> None:
        for name in ("d_in", "d_sae", "min_support", "k", "min_tokens", "selection_interval"):
            self._require(name, lambda v: v is None or v >= 1, "a whole number of at least 1")
        self._require("context_length", lambda v: v >= 2, "at least 2 tokens")
        self._require("layer", lambda v: v is None or v >= 0, "a layer counted from 0")
        self._require("aux_k", lambda v: v is None or v >= 0, "None or a number of features of at least 0")
        self._require("ortsae_chunk", lambda v: v >= 2, "at least 2 features")
        for name in ("l1_coefficient", "l0_coefficient", "aux_coefficient", "ortho_coefficient", "decoder_ratio"):
            self._require(name, lambda v: v >= 0 and math.isfinite(v), "a finite number of at least 0")
        for name in ("jumprelu_bandwidth", "jumprelu_threshold"):
            self._require(name, lambda v: v > 0 and math.isfinite(v), "a finite number above 0")
        for name in ("correlation_threshold", "carry_decay"):
            self._require(name, lambda v: 0 <= v < 1, "a number in [0, 1)")
        self._require("pair_fraction", lambda v: 0 < v <= 1, "a share in (0, 1]")
        self._require("held_out_fraction", lambda v: v is None or 0 <= v < 1, "None or a share in [0, 1)")
        self._require(
            "max_norm", lambda v: v is None or (v > 0 and math.isfinite(v)), "None or a finite number above 0"
        )
        self._require("max_norm_ratio", lambda v: v is None or (v > 1 and math.isfinite(v)), "None or a number above 1")
        self._check_activation()
        self._check_penalty()

    def _check_activation(self) -> None:
        takes_k = self.activation in ("topk", "batchtopk")
        if takes_k and self.k is None:
            raise ConfigError(
                f"k=None: activation={self.activation!r} needs k, the number of active features per token"
            )
        if not takes_k and self.k is not None:
            raise ConfigError(f"k={self.k}: only activation='topk' and 'batchtopk' take k, not {self.activation!r}")
        if self.k is not None and self.d_sae is not None and self.k > self.d_sae:
            raise ConfigError(f"k={self.k}: expected at most d_sae={self.d_sae}")
        prefixes = self.matryoshka_prefixes
        if prefixes is None:
            return
        if self.activation != "batchtopk":
            raise ConfigError(f"matryoshka_prefixes={_SHORT.repr(prefixes)}: only activation='batchtopk' takes them")
        if not prefixes or prefixes[0] < 1 or sorted(set(prefixes)) != prefixes or prefixes[-1] != self.d_sae:
            raise ConfigError(
                f"matryoshka_prefixes={_SHORT.repr(prefixes)}: expected rising numbers that end with d_sae={self.d_sae}"
            )

    def _check_penalty(self) -> None:
        if self.correlation == "pearson" and self.carry_decay > 0:
            raise ConfigError(
                f"carry_decay={self.carry_decay}: carried co-activations give cosines; use correlation='cosine'"
            )
        if self.carry_decay > 0 and self.selects_by != "activation":
            raise ConfigError(
                f"carry_decay={self.carry_decay}: only pairs selected by activation are carried over, not by "
                f"{self.selects_by!r}; set carry_decay=0"
            )

    def _require(self, name: str, allowed: Any, expected: str) -> None:
        value = getattr(self, name)
        if not allowed(value):
            raise ConfigError(f"{name}={value!r}: expected {expected}")
