"""Share of the damage of zero ablation that the reconstruction undoes, in cross-entropy.

For `evaluate.load`; the class itself is in hf_selortho.
"""

from hf_selortho.evaluation.metrics import LossRecoveredMetric

__all__ = ["LossRecoveredMetric"]
