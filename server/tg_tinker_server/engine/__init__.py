"""Computes: per-sample gradients, optimizer steps, samples."""
