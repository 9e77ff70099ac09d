"""Frozen language models: loading, hook sites, capture of activations."""
