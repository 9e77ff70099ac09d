"""Base class of metrics that keep running sums.

`evaluate` writes every batch into an Arrow table on disk and computes at the end, which for feature activations
(16,384 floats a token) would be gigabytes. The metrics here keep sums in float64 instead, write no file, and forget
their sums after `compute()`. Several processes cannot share one of them as they would share tables: `num_process` has
to be 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import torch
from torch import Tensor

from ..errors import SelOrthoError


class StreamingMetric(evaluate.Metric):
    """A metric of running sums. Subclasses declare their inputs and implement `reset`, `_update` and `_result`."""

    inputs: ClassVar[dict[str, Any]] = {}
    description_text: ClassVar[str] = ""

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(config_name, **kwargs)
        if self.num_process != 1:
            raise SelOrthoError(f"num_process={self.num_process}: this metric runs in one process, pass num_process=1")
        self.tokens = 0
        self.reset()

    def _build_data_dir(self) -> str:
        return str(self._data_dir_root)  # the base class would create a folder for tables that are never written

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(self.inputs)
        described = f"Inputs: {', '.join(self.inputs)}, one row a token."
        return evaluate.MetricInfo(
            description=self.description_text, citation="", inputs_description=described, features=features
        )

    def __len__(self) -> int:
        return self.tokens

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of tokens to the running sums.

        Raises SelOrthoError where an input is missing or does not have a row for each token.
        """
        given = {"predictions": predictions, "references": references, **kwargs}
        batch = {name: self._as_tensor(name, given.get(name)) for name in self.inputs}
        sizes = {name: len(value) for name, value in batch.items()}
        if len(set(sizes.values())) > 1:
            raise SelOrthoError(f"{type(self).__name__} got {sizes} tokens: every input needs one row for each token")
        if next(iter(sizes.values())) == 0:
            return
        self._update(**batch)
        self.tokens += next(iter(sizes.values()))

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one token to the running sums."""
        given = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(
            **{name: torch.as_tensor(given[name])[None] for name in self.inputs if given.get(name) is not None}
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float | int]:
        """Add what is given, return the metric over everything added since the last call, and start anew.

        Raises SelOrthoError if no token was added.
        """
        given = {"predictions": predictions, "references": references, **kwargs}
        batch = {name: given[name] for name in self.inputs if given.get(name) is not None}
        if batch:  # inputs of other metrics are passed over, as `evaluate` does, so that `evaluate.combine` works
            self.add_batch(**batch)
        if self.tokens == 0:
            raise SelOrthoError(
                f"{type(self).__name__} was given no tokens: call add_batch first or pass {', '.join(self.inputs)}"
            )
        result = self._result()
        self.tokens = 0
        self.reset()
        return result

    def _as_tensor(self, name: str, value: Any) -> Tensor:
        if value is None:
            raise SelOrthoError(f"{type(self).__name__} needs {name}: pass {' and '.join(self.inputs)}")
        if isinstance(value, Sequence) and value and isinstance(value[0], Tensor):
            value = torch.stack(list(value))
        tensor = torch.as_tensor(value).detach()
        if isinstance(self.inputs[name], datasets.Value):
            return tensor.flatten()
        if tensor.ndim < 2:
            shape = tuple(tensor.shape)
            raise SelOrthoError(f"{type(self).__name__} got {name} of shape {shape}: expected (tokens, width)")
        return tensor.flatten(0, -2)

    @abstractmethod
    def reset(self) -> None:
        """Forget all sums."""

    @abstractmethod
    def _update(self, **batch: Tensor) -> None: ...

    @abstractmethod
    def _result(self) -> dict[str, float | int]: ...
