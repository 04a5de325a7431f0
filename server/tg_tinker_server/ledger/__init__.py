"""Spends privacy and records what was done."""
