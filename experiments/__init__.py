"""Experiments: what the penalty does to features, on worlds whose features are known and on real activations."""
