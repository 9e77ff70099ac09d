"""Held-out evaluation of trained SAEs: metrics, also for `evaluate.load`; the evaluator; tasks; pictures."""

from pathlib import Path

SAE_METRICS = str(Path(__file__).with_name("sae_metrics"))  # evaluate.load(SAE_METRICS, "reconstruction")

__all__ = ["SAE_METRICS"]
