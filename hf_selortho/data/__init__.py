"""Texts, contexts, and activations in a shuffle buffer or cached on disk."""
