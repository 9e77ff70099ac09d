"""Figures of merit of a sparse autoencoder for `evaluate.load`: the name of the configuration picks one metric.

`evaluate` writes every batch into an Arrow table on disk and computes at the end, which for feature activations
(16,384 floats a token) would be gigabytes. This module keeps sums in float64 instead, writes no file, and forgets the
sums after `compute()`. Several processes cannot share it as they would share tables: `num_process` has to be 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets
import evaluate
import torch
from torch import Tensor

from hf_selortho.checks import floats_of, named
from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation.metrics import Correlations, CrossEntropy, LossRecovered, Reconstruction, Sparsity

VECTORS = datasets.Sequence(datasets.Value("float32"))
SCALARS = datasets.Value("float32")
IDS = datasets.Value("int64")
PAIR_SETTINGS = ("batch_size", "pair_fraction", "min_support", "correlation")


class SaeMetric(NamedTuple):
    """One metric of this module."""

    description: str
    inputs: dict[str, Any]
    nothing: Callable[..., Any]  # the total before the first batch
    of: Callable[..., Any]  # what a batch of inputs adds to it


METRICS = {
    "reconstruction": SaeMetric(
        "Reconstruction error of a sparse autoencoder: mse, fvu, explained_variance.",
        {"predictions": VECTORS, "references": VECTORS},
        Reconstruction,
        lambda predictions, references: Reconstruction.of(references, predictions),
    ),
    "sparsity": SaeMetric(
        "Sparsity of feature activations: l0, l1, active and dead features.",
        {"predictions": VECTORS},
        Sparsity,
        lambda predictions: Sparsity.of(predictions),
    ),
    "correlation": SaeMetric(
        "Correlations between the features of a sparse autoencoder, per batch of tokens.",
        {"predictions": VECTORS},
        Correlations,
        lambda predictions: predictions,
    ),
    "cross_entropy": SaeMetric(
        "Cross-entropy of a language model in nats a token, and perplexity.",
        {"predictions": VECTORS, "references": IDS},
        CrossEntropy,
        lambda predictions, references: CrossEntropy.of(predictions, references.long()),
    ),
    "loss_recovered": SaeMetric(
        "Share of the damage of zero ablation that the reconstruction undoes, in cross-entropy.",
        {"predictions": SCALARS, "references": SCALARS, "ablations": SCALARS},
        LossRecovered,
        lambda predictions, references, ablations: LossRecovered.of(references, predictions, ablations),
    ),
}


class SaeMetrics(evaluate.Metric):
    """The metric of `METRICS` that `config_name` says.

    Args:
        config_name: one of reconstruction, sparsity, correlation, cross_entropy, loss_recovered.
        kwargs: `batch_size`, `pair_fraction`, `min_support` and `correlation` of the correlations; the others are those
            of `evaluate.Metric`.

    Raises:
        SelOrthoError: there is no such metric, or `num_process` is not 1.
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        if config_name not in METRICS:
            raise SelOrthoError(f"metric {config_name!r}: expected one of {', '.join(METRICS)}")
        if (num_process := kwargs.get("num_process", 1)) != 1:
            raise SelOrthoError(f"num_process={num_process}: this metric runs in one process, pass num_process=1")
        self.metric = METRICS[config_name]
        self._settings = {name: kwargs.pop(name) for name in PAIR_SETTINGS if name in kwargs}
        self._total = self.metric.nothing(**self._settings)
        super().__init__(config_name, **kwargs)

    def _build_data_dir(self) -> str:
        return str(self._data_dir_root)  # the base class would create a folder for tables that are never written

    def _info(self) -> evaluate.MetricInfo:
        inputs = f"Inputs: {', '.join(self.metric.inputs)}, one row a token."
        return evaluate.MetricInfo(
            description=self.metric.description,
            citation="",
            inputs_description=inputs,
            features=datasets.Features(self.metric.inputs),
        )

    def __len__(self) -> int:
        return int(self._total.tokens)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of tokens to the running sums.

        Raises:
            SelOrthoError: an input is missing or does not have a row for each token.
        """
        given = {"predictions": predictions, "references": references, **kwargs}
        batch = {name: self._as_tensor(name, given.get(name)) for name in self.metric.inputs}
        sizes = {name: len(value) for name, value in batch.items()}
        if len(set(sizes.values())) > 1:
            raise SelOrthoError(f"{self.config_name} got {sizes} tokens: every input needs one row for each token")
        if sizes["predictions"]:
            self._total += self.metric.of(**batch)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one token to the running sums."""
        given = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: [value] for name, value in given.items() if value is not None})

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float | int]:
        """Add what is given, return the metric over everything added since the last call, and start anew.

        Raises:
            SelOrthoError: no token was added.
        """
        given = {"predictions": predictions, "references": references, **kwargs}
        batch = {name: given[name] for name in self.metric.inputs if given.get(name) is not None}
        if batch:  # inputs of other metrics are passed over, as `evaluate` does, so that `evaluate.combine` works
            self.add_batch(**batch)
        if not len(self):
            needed = ", ".join(self.metric.inputs)
            raise SelOrthoError(f"{self.config_name} was given no tokens: call add_batch first or pass {needed}")
        figures: dict[str, float | int] = self._total.figures()
        self._total = self.metric.nothing(**self._settings)
        return figures

    def _as_tensor(self, name: str, value: Any) -> Tensor:
        if value is None:
            raise SelOrthoError(f"{self.config_name} needs {name}: pass {' and '.join(self.metric.inputs)}")
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            value = list(value)  # a column of a data set has no other way to a tensor
        if self.metric.inputs[name] == IDS:
            with contextlib.suppress(TypeError, ValueError):
                value = torch.as_tensor(value).flatten()
            if not isinstance(value, Tensor) or value.dtype in (torch.bool, torch.float32, torch.float64):
                raise SelOrthoError(f"references: got {named(value)}, expected token ids")
            return value
        if not isinstance(value, Tensor):  # `evaluate` declares the inputs as float32, which whole numbers become
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                numbers = torch.as_tensor(value)
                value = value if numbers.dtype == torch.bool or numbers.is_complex() else numbers.float()
        tensor = floats_of(value, name, finite=True).detach()
        if self.metric.inputs[name] == SCALARS:
            return tensor.flatten()
        if tensor.ndim < 2:
            raise SelOrthoError(
                f"{self.config_name} got {name} of shape {tuple(tensor.shape)}: expected (tokens, width)"
            )
        return tensor.flatten(0, -2)
