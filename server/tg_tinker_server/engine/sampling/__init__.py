"""Sampling on tokens from frozen weights, many requests at once."""
