"""Reconstruction error of a sparse autoencoder: mse, fvu, explained_variance.

For `evaluate.load`; the class itself is in hf_selortho.
"""

from hf_selortho.evaluation.metrics import ReconstructionMetric

__all__ = ["ReconstructionMetric"]
