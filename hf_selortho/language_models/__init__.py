"""Frozen language models: loading, hook sites, and activations read or replaced at them."""
