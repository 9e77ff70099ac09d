"""Configuration of a selective-orthogonality sparse autoencoder.

Every setting of the SAE is declared here once, with what it may be; the command line of the training script is derived
from these fields (whose annotations must therefore be types, not strings: no `from __future__ import annotations`).
"""

import difflib
import logging
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig

try:  # this file also lives on the Hub, without the package
    from hf_selortho.errors import ConfigError
    from hf_selortho.utils import hub
    from hf_selortho.utils.names import located
    from hf_selortho.utils.sae_formats import check_own
except ModuleNotFoundError:
    hub = None  # type: ignore[assignment]

    class ConfigError(ValueError):  # type: ignore[no-redef]
        """A field of a configuration has a value that is not allowed."""


logger = logging.getLogger(__name__)

CONFIG_VERSION = 1

Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]
Penalty = Literal["selective", "full", "ortsae", "none"]
Space = Literal["activation", "decoder", "redundancy", "exclusion"]  # redundancy: in SAEs of version 0.1.0
SelectionSpace = Literal["same", "activation", "decoder", "redundancy"]
DecoderPairs = Literal["alike", "nearest"]
PenaltySchedule = Literal["on_selection", "every_step"]
Correlation = Literal["cosine", "pearson"]
Reduction = Literal["mean", "sum"]
InputNormalization = Literal["standard", "none"]
Side = Literal["input", "output"]

SITES = (
    "resid_pre",
    "attn_z",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_out",
    "resid_post",
)  # see language_models/sites.py
MODULE_SITE = re.compile(r"(\S+):(input|output)")  # any module, by its path in the language model

Range = tuple[Callable[[Any], bool], str]  # whether a value is in it, and what it holds in words
_COUNT: Range = (lambda v: 1 <= v < 2**63, "a whole number of at least 1")
_SEVERAL: Range = (lambda v: 2 <= v < 2**63, "a whole number of at least 2")
_INDEX: Range = (lambda v: 0 <= v < 2**63, "a whole number of at least 0")
_WEIGHT: Range = (lambda v: 0 <= v < math.inf, "a finite number of at least 0")
_POSITIVE: Range = (lambda v: 0 < v < math.inf, "a finite number above 0")
_RATIO: Range = (lambda v: 1 < v < math.inf, "a finite number above 1")
_SHARE: Range = (lambda v: 0 <= v < 1, "a number in [0, 1)")
_FRACTION: Range = (lambda v: 0 < v <= 1, "a number in (0, 1]")
SITE: Range = (
    lambda v: v in SITES or MODULE_SITE.fullmatch(v) is not None,
    f"one of {', '.join(SITES)}, or a module as PATH:input or PATH:output",
)
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_DTYPE: Range = (lambda v: str(v).removeprefix("torch.") in _DTYPES, f"one of {', '.join(_DTYPES)}")

# What transformers writes beside its fields; "auto_map" names code of a repository, which only the Auto classes run.
_IGNORED = {"auto_map", "model_type", "name_or_path", "_name_or_path", "output_attentions", "torch_dtype"}


def _setting(default: Any, description: str, allowed: Range | None = None) -> Any:
    def check(value: Any) -> None:
        if allowed is not None and value is not None and not allowed[0](value):
            raise ValueError(allowed[1])

    return field(default=default, metadata={"help": description, "validator": check})


def _in_one_line(cls: Any) -> Any:
    """Turn the errors of a strict dataclass into [`ConfigError`], and let whole numbers be floats."""
    types = {f.name: get_args(f.type) or (f.type,) for f in fields(cls)}
    assign, validate = cls.__setattr__, cls.validate

    def assign_checked(self: Any, name: str, value: Any) -> None:
        given = value
        if type(value) is int and float in types.get(name, ()):
            value = float(value) if abs(value) < 2**63 else math.inf
        try:
            assign(self, name, value)
        except StrictDataclassFieldValidationError as error:
            expected = str(error.__cause__) if type(error.__cause__) is ValueError else _in_words(types[name])
            raise ConfigError(f"{name}={reprlib.repr(given)}: expected {expected}") from error

    def validate_all(self: Any) -> None:
        try:
            validate(self)
        except StrictDataclassClassValidationError as error:
            raise ConfigError(" ".join(str(error.__cause__).split())) from error

    validate_all.__is_defined_by_strict_decorator__ = True  # type: ignore[attr-defined]
    cls.__setattr__, cls.validate = assign_checked, validate_all
    return cls


def _in_words(types: tuple[Any, ...]) -> str:
    if isinstance(types[0], str):
        return f"one of {', '.join(map(repr, types))}"
    names = ("None" if t is type(None) else str(t) if get_origin(t) else t.__name__ for t in types)
    return " or ".join(names)


def score_of_selection(penalty_space: str, selection_space: str) -> str:
    """Return by which score ("activation", "decoder" or "redundancy") these settings select pairs."""
    own = "decoder" if penalty_space == "exclusion" else penalty_space
    return own if selection_space == "same" else selection_space


@_in_one_line
@strict
class SelOrthoConfig(PreTrainedConfig):
    """Settings of a [`SelOrthoSAE`] and of the language-model activations that it was trained on.

    The loss is eq. 7 of the paper: `mean_B |x_hat - x|^2 + l1_coefficient * mean_B |h|_1 + ortho_coefficient * R *
    sum_T c_ij^2`, where `T` are the `ceil(pair_fraction * n (n - 1) / 2)` most correlated pairs of features of the
    batch. The fields carry their own description: `SelOrthoConfig.describe()` returns them.

    Raises:
        ConfigError: a value is not allowed; the message names the field, the value and what is allowed.
    """

    model_type = "selortho_sae"

    d_in: int | None = _setting(None, "Width of the activations that are read.", _COUNT)
    d_out: int | None = _setting(None, "Width of the activations that a transcoder reconstructs.", _COUNT)
    d_sae: int | None = _setting(None, "Number of features; the paper uses as many as d_in.", _COUNT)
    activation: Activation = _setting(
        "relu", "Activation function: relu (the paper), topk, batchtopk (k on average over a batch) or jumprelu."
    )
    k: int | None = _setting(None, "Active features per token; only with activation topk or batchtopk.", _COUNT)
    l1_coefficient: float = _setting(
        0.04, "Weight of the L1 sparsity term, eq. 7; it acts with activation relu only.", _WEIGHT
    )
    l0_coefficient: float = _setting(0.001, "Weight of the mean L0; it acts with activation jumprelu only.", _WEIGHT)
    jumprelu_bandwidth: float = _setting(
        0.05, "Width of the kernel through which jumprelu's thresholds learn.", _POSITIVE
    )
    jumprelu_threshold: float = _setting(0.01, "Thresholds of jumprelu at the start.", _POSITIVE)
    aux_k: int | None = _setting(
        None,
        "Dead features that explain what is left over, per token (topk, batchtopk); None: d_in / 2; 0: none.",
        _INDEX,
    )
    aux_coefficient: float = _setting(1 / 32, "Weight of that auxiliary loss, which revives dead features.", _WEIGHT)
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
        "(decoder), or that cosine times how rarely they fire together (exclusion).",
    )
    selection_space: SelectionSpace = _setting("same", "By which of these the pairs are selected; same: the penalty's.")
    # Measured (RESULTS.md, Gemma-3-270m): at 0.03 the top correlations fall by 29% (ReLU) and 36% (TopK) for 0.8% and
    # 2.3% more FVU; the paper's 0.1 buys 40% and 53%, for 3% and 10%.
    ortho_coefficient: float = _setting(0.03, "Weight of the decorrelation penalty, eq. 7 (the paper: 0.1).", _WEIGHT)
    decoder_ratio: float = _setting(
        0.0,
        "Weight, relative to ortho_coefficient, of a second penalty beside the selective one: the squared decoder "
        "cosine of pairs of features.",
        _WEIGHT,
    )
    decoder_pairs: DecoderPairs = _setting(
        "alike",
        "The pairs of that second penalty: the pair_fraction whose directions are most alike, or each feature and its "
        "nearest (as ortsae).",
    )
    pair_fraction: float = _setting(
        0.001, "Share of all feature pairs that the selective penalty acts on, eq. 5.", _FRACTION
    )
    correlation_threshold: float = _setting(
        0.0,
        "Pairs whose score is below this are left alone; with a large pair_fraction, the threshold selects.",
        _SHARE,
    )
    correlation: Correlation = _setting("cosine", "Uncentred cosine (eq. 4) or centred Pearson correlation.")
    reduction: Reduction = _setting("mean", "Penalty as the mean over the pairs or their sum (the paper).")
    min_support: int = _setting(
        4, "A feature takes part in a pair if it fired on at least this many tokens of the batch.", _COUNT
    )
    selection_interval: int = _setting(
        12, "Steps between two selections of pairs, which costs that many times less than the paper's 1.", _COUNT
    )
    penalty_schedule: PenaltySchedule = _setting(
        "on_selection",
        "Between selections, the penalty rests and then acts with the weight of all these steps (on_selection), or "
        "acts at every step on the pairs selected last (every_step).",
    )
    carry_decay: float = _setting(
        0.0,
        "Share of the earlier batches' co-activations that a selection carries over, so that rare features count.",
        _SHARE,
    )
    ortsae_chunk: int = _setting(8192, "Features that the penalty ortsae compares with one another.", _SEVERAL)
    input_normalization: InputNormalization = _setting(
        "standard", "standard: centre the activations and scale them to a mean squared norm of 1; none: use them raw."
    )
    skip: bool = _setting(
        False, "Whether a transcoder adds a linear map of what it reads to what it reconstructs (Paulo et al. 2025)."
    )
    lm_name: str | None = _setting(None, "Language model whose activations the SAE reads.")
    lm_revision: str | None = _setting(None, "Resolved commit (or content hash) of the language model.")
    layer: int | None = _setting(
        None, "Decoder layer, counted from 0, at which activations are read (resid_post: after it).", _INDEX
    )
    site: str = _setting(
        "resid_post",
        "Where the SAE reads: resid_pre, resid_mid, resid_post (the residual stream before, within and after the "
        "layer), attn_z (heads, before the output projection), attn_out, mlp_in, mlp_out (what is added), or any "
        "module as PATH:input or PATH:output.",
        SITE,
    )
    target: str | None = _setting(
        None, "The site that a transcoder reconstructs, as mlp_out beside site mlp_in; None: what is read.", SITE
    )
    hook_name: str | None = _setting(None, "Module of the language model that is read.")
    hook_side: Side = _setting("output", "Which side of that module.")
    target_hook_name: str | None = _setting(None, "Module that is reconstructed, where that is another place.")
    target_hook_side: Side = _setting("output", "Which side of that module.")
    centered: bool = _setting(
        False,
        "Whether the SAE reads activations less their mean over the d_in entries, as TransformerLens has them with "
        "center_writing_weights; it subtracts the mean itself.",
    )
    context_length: int = _setting(128, "Longest context in tokens, BOS included.", _SEVERAL)
    prepend_bos: bool = _setting(True, "Whether each context starts with BOS (left out of the training data).")
    # Measured on Gemma-3-270m: ordinary tokens stay below 2.3 times the median norm, sinks start at 4.7 times.
    max_norm_ratio: float | None = _setting(
        4.0,
        "Tokens whose norm exceeds this multiple of the median are left out; None (--max_norm_ratio inf) keeps all.",
        _RATIO,
    )
    max_norm: float | None = _setting(
        None, "The norm that this came to: tokens of a larger one were left out.", _POSITIVE
    )
    dataset: str | None = _setting(None, "Dataset of the training text.")
    dataset_revision: str | None = _setting(None, "Resolved commit of the dataset.")
    dataset_config: str | None = _setting(None, "Configuration of the dataset, where it has several.")
    dataset_split: str | None = _setting(None, "Split of the dataset.")
    text_column: str | None = _setting(None, "Column of the dataset that holds the text.")
    chat_column: str | None = _setting(None, "Column of chats, read by the tokenizer's chat template, in its place.")
    chat_roles: list[str] | None = _setting(None, "Roles whose messages were trained on; None: all, and the template.")
    separator: str | None = _setting(None, "Separator of its csv files, where it was given.")
    encoding: str | None = _setting(None, "Encoding of its files, where it was given.")
    min_tokens: int | None = _setting(None, "Contexts with fewer tokens than this were left out.", _COUNT)
    held_out_fraction: float | None = _setting(None, "Share of the documents that training never saw.", _SHARE)
    config_version: int = _setting(CONFIG_VERSION, "Version of this format.", _COUNT)
    dtype: str | torch.dtype | None = _setting(None, "", _DTYPE)  # of transformers, which does not check it

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_misspelt(kwargs)
        for name in ("d_in", "d_sae"):
            if getattr(self, name) is None:
                raise ConfigError(f"{name} is missing: SelOrthoConfig needs d_in and d_sae, e.g. d_in=640, d_sae=1280")
        if self.target is not None and self.d_out is None:
            self.d_out = self.d_in
        super().__post_init__(**kwargs)

    def validate_activation(self) -> None:
        """Check what the activation function takes."""
        takes_k, prefixes = self.activation in ("topk", "batchtopk"), self.matryoshka_prefixes
        if takes_k and self.k is None:
            raise ValueError(f"k=None: activation={self.activation!r} needs k, the number of active features per token")
        if not takes_k and self.k is not None:
            raise ValueError(f"k={self.k}: only activation='topk' and 'batchtopk' take k, not {self.activation!r}")
        if self.k is not None and self.d_sae is not None and self.k > self.d_sae:
            raise ValueError(f"k={self.k}: expected at most d_sae={self.d_sae}")
        if prefixes is not None and self.activation != "batchtopk":
            raise ValueError(f"matryoshka_prefixes={reprlib.repr(prefixes)}: only activation='batchtopk' takes them")
        if prefixes is not None and ([0, *prefixes] != sorted({0, *prefixes}) or prefixes[-1:] != [self.d_sae]):
            raise ValueError(
                f"matryoshka_prefixes={reprlib.repr(prefixes)}: expected rising numbers up to d_sae={self.d_sae}"
            )

    def validate_target(self) -> None:
        """Check that a transcoder has a target of its own, and that only a transcoder has what belongs to one."""
        if self.target is None:
            if self.skip:
                raise ValueError(
                    "skip=True: only a transcoder takes it, which has a target; an SAE would copy its input"
                )
            if self.d_out not in (None, self.d_in):
                raise ValueError(
                    f"d_out={self.d_out}: without a target, an SAE reconstructs what it reads, d_in={self.d_in}"
                )
        elif self.target == self.site:
            raise ValueError(f"target={self.target!r} is the site that is read: leave the target out for an SAE")
        elif self.centered:
            raise ValueError("centered=True with a target: a transcoder reads activations as they are")

    def validate_penalty(self) -> None:
        """Check that co-activations are carried over only where pairs are selected by their cosines."""
        if self.carry_decay > 0 and (self.correlation != "cosine" or self.selects_by != "activation"):
            raise ValueError(
                f"carry_decay={self.carry_decay}: only pairs selected by the cosine of their activations are carried "
                f"over, not by {self.correlation!r} in {self.selects_by!r} space; set carry_decay=0"
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the content of a config.json, and the arguments that do not say where it is.

        Raises:
            SelOrthoError: there is none.
            ConfigError: it is damaged, or that of another kind of model or of an SAE of another library.
        """
        if not hub:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        name = os.fspath(pretrained_model_name_or_path)
        lookup = {key: kwargs.pop(key) for key in hub.LOOKUP if key in kwargs}
        if not os.path.isfile(name):
            name, lookup = located(name, lookup)
        path = Path(name) if os.path.isfile(name) else hub.find_config(name, lookup)
        content = hub.read_object(path)
        check_own(content, path, cls.model_type)
        return content, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from the content of a config.json; of that, only the settings of an SAE are taken.

        transformers would make an attribute of everything else, and follow some of it to other files and other code.

        Raises:
            ConfigError: a value is not allowed.
        """
        version = config_dict.get("config_version")
        if type(version) is int and version > CONFIG_VERSION:
            raise ConfigError(
                f"config_version={reprlib.repr(version)}: this SAE was saved by a newer hf_selortho (this one reads up "
                f"to version {CONFIG_VERSION}); update with: pip install -U hf_selortho"
            )
        own = {f.name for f in cls.own_fields()}
        unknown = sorted(config_dict.keys() - {f.name for f in fields(cls)} - _IGNORED)
        cls._refuse_misspelt(unknown[:100])
        if unknown:
            logger.warning("without effect, as SelOrthoConfig does not know them: %s", reprlib.repr(unknown))
        taken = {key: value for key, value in config_dict.items() if key in own | {"dtype"}}
        overrides = {key: kwargs.pop(key) for key in own & kwargs.keys()}
        made: Any = super().from_dict({**taken, **overrides}, **kwargs)
        source = config_dict.get("auto_map")
        if cls.__module__.startswith("transformers_modules.") and isinstance(source, dict):
            # this class is itself a repository's code, which the user trusts: AutoModel looks here for the model's
            config = made[0] if isinstance(made, tuple) else made
            config.auto_map = {str(key): str(value) for key, value in source.items()}
        return made

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to publish a config without its SAE, whose `push_to_hub` publishes both; needs the package."""
        if hub:
            raise ConfigError("a config is published with its SAE: use SelOrthoSAE.push_to_hub")
        return super().push_to_hub(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save config.json in a folder; `push_to_hub=True` raises as [`push_to_hub`]."""
        if push_to_hub and hub:
            self.push_to_hub()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def own_fields(cls) -> list[Field]:
        """Return the fields declared by this class, without those of `PreTrainedConfig`."""
        return [f for f in fields(cls) if f.metadata.get("help")]

    @classmethod
    def default_settings(cls) -> dict[str, Any]:
        """Return the default of every field by name."""
        return {f.name: f.default for f in cls.own_fields()}

    @classmethod
    def describe(cls) -> dict[str, str]:
        """Return the description of every field by name."""
        return {f.name: f.metadata["help"] for f in cls.own_fields()}

    def own_settings(self) -> dict[str, Any]:
        """Return the values of the fields declared by this class."""
        return {f.name: getattr(self, f.name) for f in self.own_fields()}

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter and buffer of a `SelOrthoSAE` by name, without making one."""
        d_in, d_sae, d_out = self.d_in, self.d_sae, self.width_out
        assert d_in is not None and d_sae is not None  # checked above
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out)}
        shapes |= {"b_dec": (d_out,), "input_mean": (d_in,), "input_scale": ()}
        if self.is_transcoder:
            shapes |= {"output_mean": (d_out,), "output_scale": ()}
        if self.skip:
            shapes["W_skip"] = (d_in, d_out)
        if self.activation == "batchtopk":
            shapes["threshold"] = ()
        if self.activation == "jumprelu":
            shapes["log_threshold"] = (d_sae,)
        return shapes

    @property
    def is_transcoder(self) -> bool:
        """Whether it reconstructs another site than the one that it reads."""
        return self.target is not None

    @property
    def written_site(self) -> str:
        """The site that is reconstructed, in whose space the decoder directions lie."""
        return self.target or self.site

    @property
    def layer_of_site(self) -> int | None:
        """Layer of the site that is read, 0 for a module, which is of none; None where it is not said."""
        return 0 if self.layer is None and self.site not in SITES else self.layer

    @property
    def width_out(self) -> int:
        """Width of what is reconstructed: `d_out`, or `d_in` where it is not set."""
        width = self.d_out or self.d_in
        assert width is not None  # checked above
        return width

    @property
    def selects_by(self) -> str:
        """The score by which pairs are selected: "activation", "decoder" or "redundancy"."""
        return score_of_selection(self.penalty_space, self.selection_space)

    @classmethod
    def _refuse_misspelt(cls, keys: Iterable[str]) -> None:
        # transformers keeps unknown keyword arguments as attributes: a misspelt setting would silently do nothing
        names = [f.name for f in cls.own_fields()]
        for key in keys:
            if close := difflib.get_close_matches(key, names, n=1, cutoff=0.8):
                raise ConfigError(f"{key} is not a setting of SelOrthoConfig; did you mean {close[0]}?")
