"""What the features of a trained SAE do, for a person to look at."""

from .token_features import FeatureCapture, TokenFeatures, inspect, warn_of_other_lm

__all__ = ["FeatureCapture", "TokenFeatures", "inspect", "warn_of_other_lm"]
