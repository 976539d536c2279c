"""`python -m sterna.cli` is the `sterna` command."""

from __future__ import annotations

from sterna.cli.main import main

main()
