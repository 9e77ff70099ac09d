"""Held-out evaluation of a trained SAE: pure functions, `evaluate` metrics, the evaluator and its pictures."""
