"""Sparsity of feature activations: l0, l1, active and dead features.

For `evaluate.load`; the class itself is in hf_selortho.
"""

from hf_selortho.evaluation.metrics import SparsityMetric

__all__ = ["SparsityMetric"]
