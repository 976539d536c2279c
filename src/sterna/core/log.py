"""Logging: one logger tree, one line a fact, to stderr."""

from __future__ import annotations

import logging
import os
import sys

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `get_logger(__name__)`."""
    return logging.getLogger(name)


def setup_logging(level: str | None = None) -> None:
    """Send Sterna's log to stderr. `STERNA_DEBUG=1` lowers the level to DEBUG."""
    chosen = level or ("DEBUG" if os.environ.get("STERNA_DEBUG") else "INFO")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
    root = logging.getLogger("sterna")
    root.handlers[:] = [handler]
    root.setLevel(chosen)
    root.propagate = False
