"""What the features of a trained SAE do, for a person to look at."""

from .heads import head_norms
from .index import FeatureIndex
from .records import FeatureRecord, PairRecord
from .sampling import Sampling
from .steering import Generation, Steer, Steering
from .token_features import FeatureCapture, TokenFeatures, inspect, warn_of_other_lm

__all__ = [
    "FeatureCapture",
    "FeatureIndex",
    "FeatureRecord",
    "Generation",
    "PairRecord",
    "Sampling",
    "Steer",
    "Steering",
    "TokenFeatures",
    "head_norms",
    "inspect",
    "warn_of_other_lm",
]
