"""Batches of activations to a trained SAE."""
