"""Cross-entropy of a language model in nats a token, and perplexity.

For `evaluate.load`; the class itself is in hf_selortho.
"""

from hf_selortho.evaluation.metrics import CrossEntropyMetric

__all__ = ["CrossEntropyMetric"]
