"""Held-out evaluation of a trained SAE: pure functions, `evaluate` metrics, the evaluator and its pictures."""

from .module_folders import METRIC_MODULES, metric_path

__all__ = ["METRIC_MODULES", "metric_path"]
