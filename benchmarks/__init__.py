"""Benchmarks: what a training step costs with each penalty, in time and memory."""
