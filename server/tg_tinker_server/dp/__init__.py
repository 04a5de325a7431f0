"""Differential privacy as arithmetic: events, accounting, clipping, noise."""
