"""Encrypted checkpoints: bytes, storage, sealing and opening."""
