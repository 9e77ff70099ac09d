"""Correlations between the features of a sparse autoencoder, per batch of tokens.

For `evaluate.load`; the class itself is in hf_selortho.
"""

from hf_selortho.evaluation.metrics import CorrelationMetric

__all__ = ["CorrelationMetric"]
