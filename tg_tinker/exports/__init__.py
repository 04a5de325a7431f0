"""Models that leave a server: the files of an export, how they are signed, sealed, opened and checked.

Formats byte by byte: docs/formats/export.md.
"""
