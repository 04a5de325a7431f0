"""Structured log lines with ids, sizes and codes; never content."""

from __future__ import annotations

import logging

import structlog


def configure_logging(*, level: str, style: str) -> None:
    """Write lines of at least ``level`` to standard output, as "json" or for a "console"."""
    renderer = structlog.processors.JSONRenderer() if style == "json" else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
    )
