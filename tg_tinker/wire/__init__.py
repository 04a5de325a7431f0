"""Protobuf meets our types here and nowhere else."""
