"""The client's half of the transparency log: checking what a server shows, and remembering it.

Formats byte by byte: docs/formats/log.md.
"""
