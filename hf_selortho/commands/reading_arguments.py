"""Arguments of the commands that read text with an SAE, in a module that imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch

from ..utils.options import Count, CountOrZero, Range, Seed, argument, one_of

APPROXIMATE = "Read what cannot be read exactly, such as cross-layer transcoders, and say what is lost."


@dataclass
class ReadingArguments:
    """What an SAE reads; whatever is not given is taken from its config."""

    revision: str | None = argument(None, "Branch, tag or commit of the SAE.")
    subfolder: str | None = argument(None, "Folder of the SAE within its repository.")
    approximate: bool = argument(False, APPROXIMATE)
    model: str | None = argument(None, "Language model; default: the one that the SAE was trained on.")
    model_revision: str | None = argument(None, "Its branch, tag or commit; default: that of the training.")
    layer: CountOrZero | None = argument(None, "Decoder layer that the SAE reads; default: that of its config.")
    lm_dtype: Annotated[str, one_of("auto", "bfloat16", "float32")] = argument(
        "auto", "auto (bfloat16 where it is fast, else float32), bfloat16 or float32."
    )
    dataset: str | None = argument(
        None, "Hub id, local file or folder, sae-probes or python-docs; default: that of the training."
    )
    dataset_config: str | None = argument(None, "Configuration of the dataset, where it has several.")
    split: str | None = argument(None, "Split of the dataset; default: that of the training.")
    text_column: str | None = argument(None, "Column that holds the text; default: text, or the only text column.")
    chat_column: str | None = argument(None, "Column of chats, lists of {role, content}; default: as in training.")
    chat_roles: list[str] | None = argument(None, "Roles whose messages are read; default: those of the training.")
    separator: str | None = argument(None, "Separator of csv files; default: that of the training.")
    encoding: str | None = argument(None, "Encoding of csv, json and txt files; default: that of the training.")
    streaming: bool = argument(False, "Read the dataset as a stream.")
    held_out_fraction: Annotated[float, Range(lambda v: 0 < v <= 1, "a share in (0, 1]")] | None = argument(
        None, "Share of the documents to draw from; default: those held out in training; 1: all, for other text."
    )
    min_tokens: Count | None = argument(None, "Contexts with fewer tokens are left out; default: as in training.")
    cpu: bool = argument(False, "Use the CPU even where there is a GPU.")

    @property
    def device(self) -> str:
        """Where to compute."""
        return "cuda" if torch.cuda.is_available() and not self.cpu else "cpu"

    @property
    def lookup(self) -> dict[str, Any]:
        """Where in a repository the SAE is, and how it is read."""
        return {key: getattr(self, key) for key in ("revision", "subfolder", "approximate") if getattr(self, key)}


@dataclass
class EvaluateArguments(ReadingArguments):
    """What to evaluate, and on what; whatever is not given is taken from the SAE's config."""

    batch_size: Count = argument(4096, "Tokens of the batches that correlations are measured on.")
    eval_samples: Count = argument(1000, "Held-out contexts.")
    eval_ce_samples: CountOrZero = argument(
        64, "Of these, contexts on which the language model's own loss is measured."
    )
    label_column: str | None = argument(None, "Column of labels of the dataset: probe the features for them.")
    probing_texts: Annotated[int, Range(lambda v: v >= 8, "at least 8")] = argument(
        1000, "Labelled held-out texts that are probed, half of them for the test."
    )
    first_letter_words: CountOrZero = argument(
        0, "Words of the first-letter task, which measures absorption; 0: do not."
    )
    probes: bool = argument(False, "Probe the features on texts of sae-probes, beside the language model itself.")
    sets: Annotated[str, one_of("quick", "all")] = argument(
        "quick", "Which: a dozen sets, a part of each (minutes), or the benchmark of all 113 (hours without a GPU)."
    )
    compare_with: list[str] = argument([], "SAEs of other seeds or methods: how alike their decoder directions are.")
    output: str | None = argument(None, "JSON file to write the metrics to.")


@dataclass
class IndexArguments(ReadingArguments):
    """What to build, and on what text; whatever is not given is taken from the SAE's config."""

    twin: str | None = argument(
        None, "Folder or Hub id of the SAE trained without the penalty; default: the one beside it, NAME_twin."
    )
    output: str | None = argument(None, "Folder of the index; default: feature_index in the folder of the SAE.")
    overwrite: bool = argument(False, "Replace the index that is there.")
    tokens: Count = argument(1_000_000, "Tokens of held-out text to read, as 2_000_000 or 2000000.")
    max_pairs: CountOrZero = argument(5000, "Pairs in the index at most, the strongest.")
    top_contexts: Count = argument(10, "Strongest contexts kept of each feature.")
    concepts: Annotated[str, one_of("auto", "quick", "all", "none")] = argument(
        "auto",
        "Sets of texts of the package sae-probes to name features after; auto: a quick dozen, where it is installed.",
    )
    labels: str | None = argument(None, 'JSON file of labels by feature: {"12": "import statements"}.')
    seed: Seed = argument(0, "Seed of the contexts drawn at random.")
    explain: bool = argument(
        False,
        "Label features by a language model, which is sent contexts of the text and asked at --explain_url; again with "
        "the same arguments, an index that is there is kept and only what is missing is asked.",
    )
    explain_url: str | None = argument(
        None,
        "OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1: contexts of the text are sent there. Its key "
        "is read from EXPLAIN_API_KEY, for api.openai.com also from OPENAI_API_KEY.",
    )
    explain_model: str | None = argument(None, "Name of the language model at that endpoint.")
    explain_features: Count = argument(
        100, "Features to explain at most: those whose label is unclear first, the most frequent first."
    )
    explain_budget: Count = argument(
        1_000_000, "Tokens that the requests may take together; with 1, the cost is estimated and nothing is sent."
    )
